"""Float model folders in diffusers' layout, of any age."""

from pathlib import Path

from transformers import CLIPTokenizer

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.config_checks import CONFIG_FILES, check_configs, list_sampler_differences
from tinysd_batch.model.checkpoint.folder import PIPELINE_INDEX
from tinysd_batch.model.checkpoint.info import MODEL_DEFAULTS_FILE, read_model_defaults, read_model_sizes
from tinysd_batch.model.checkpoint.json_file import read_json_object
from tinysd_batch.model.text.tokenizer import check_vocabulary, read_tokenizer
from tinysd_batch.quantize.sources.checkpoint_source import (
    SourceComponent,
    SourceOptions,
    SourceReport,
    check_text_encoder_tensors,
    check_unet_tensors,
    check_vae_tensors,
    has_encoder,
    write_json,
)
from tinysd_batch.quantize.sources.clip_tokenizer import VOCAB_SIZE, write_clip_tokenizer
from tinysd_batch.quantize.sources.component_files import read_component
from tinysd_batch.quantize.sources.ldm_config import SCHEDULER_CONFIG
from tinysd_batch.quantize.sources.vae import rename_old_attention

# All that transformers reads of a CLIP tokenizer, of any age.
TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.json",
)  # fmt: skip
DECODER_ONLY_VAE = ["tinysd_batch.diffusers", "AutoencoderKLDecoder"]


class DiffusersFolderSource:
    """A folder with `unet`, `vae` and `text_encoder`. Raises ModelError where it holds another kind of model."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        if options.ema:
            raise ModelError(f"{path}: --ema: a model folder has no EMA copies; they come in single files")
        self.path = path
        self.options = options
        self.name = path.resolve().name
        self.report = SourceReport()
        configs = {
            part: read_json_object(path / part / name)
            for part, name in CONFIG_FILES.items()
            if (path / part / name).exists()
        }
        if configs.get("unet", {}).get("quantization_config") is not None:
            raise ModelError(f"{path}: this is a packed model: it is quantized already; a float model is needed")
        if options.vae is not None:
            configs.pop("vae", None)
        check_configs(path, configs)
        read_model_defaults(path)
        read_model_sizes(path, own_vae=options.vae is None)
        self.scheduler = configs.get("scheduler", dict(SCHEDULER_CONFIG))
        self.report.notes += list_sampler_differences(self.scheduler)
        self.read_tokenizer()  # before any work is done that it would spoil

    def unet(self) -> SourceComponent:
        part = read_component(self.path / "unet", "unet", self.options)
        check_unet_tensors(part)
        return part

    def vae(self) -> SourceComponent:
        if self.options.vae is not None:
            from tinysd_batch.quantize.sources.vae import read_vae

            return read_vae(self.options.vae, self.options)
        part = read_component(self.path / "vae", "vae", self.options)
        part = SourceComponent(part.config, rename_old_attention(part.tensors), part.path)
        index = self.path / PIPELINE_INDEX
        without_encoder = index.exists() and read_json_object(index).get("vae") == DECODER_ONLY_VAE
        if not has_encoder(part) and not without_encoder:
            raise ModelError(f"{part.path}: the autoencoder has no encoder")
        check_vae_tensors(part)
        return part

    def text_encoder(self) -> SourceComponent:
        part = read_component(self.path / "text_encoder", "text_encoder", self.options)
        bare = {name.removeprefix("text_model."): value for name, value in part.tensors.items()}
        ids = [name for name in bare if name.endswith("position_ids")]
        for name in ids:
            del bare[name]
        if ids:
            self.report.ignored["position ids"] = len(ids)
        part = SourceComponent(part.config, bare, part.path)
        check_text_encoder_tensors(part)
        return part

    def write_scheduler_and_tokenizer(self, folder: Path) -> None:
        write_json(folder / "scheduler" / "scheduler_config.json", self.scheduler)
        ours = read_json_object(self.path / MODEL_DEFAULTS_FILE) if (self.path / MODEL_DEFAULTS_FILE).exists() else {}
        write_json(folder / MODEL_DEFAULTS_FILE, {"name": self.name, **ours})
        self.write_tokenizer_files(folder / "tokenizer")

    def read_tokenizer(self) -> CLIPTokenizer | None:
        """The folder's own tokenizer; None where it has none and its text encoder is CLIP's. Raises ModelError."""
        source = self.path / "tokenizer"
        words: int = read_json_object(self.path / "text_encoder" / "config.json").get("vocab_size", VOCAB_SIZE)
        if any((source / name).is_file() for name in TOKENIZER_FILES):
            tokenizer = read_tokenizer(source)
            check_vocabulary(tokenizer, words, source)
            return tokenizer
        if words != VOCAB_SIZE:
            raise ModelError(f"{self.path}: it has no tokenizer, and its text encoder is not CLIP's")
        return None

    def write_tokenizer_files(self, folder: Path) -> None:
        """The folder's own tokenizer, as it is; CLIP's where it has none and its text encoder is CLIP's."""
        tokenizer = self.read_tokenizer()
        if tokenizer is None:
            text = read_json_object(self.path / "text_encoder" / "config.json")
            write_clip_tokenizer(folder, text["max_position_embeddings"])
            return
        source = self.path / "tokenizer"
        folder.mkdir()
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                (folder / name).write_bytes((source / name).read_bytes())
        if not are_tokenizers_equal(tokenizer, read_tokenizer(folder)):
            raise ModelError(f"{source}: a copy of this tokenizer reads texts in another way; it is not supported")


def are_tokenizers_equal(one: CLIPTokenizer, other: CLIPTokenizer) -> bool:
    """Whether two tokenizers have the same tokens, marks and rules."""
    return bool(
        one.get_vocab() == other.get_vocab()
        and one.added_tokens_decoder == other.added_tokens_decoder
        and one.special_tokens_map == other.special_tokens_map
        and one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    )
