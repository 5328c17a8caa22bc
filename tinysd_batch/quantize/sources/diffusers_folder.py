"""Read float model folders in diffusers' layout, including those of early versions."""

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
from tinysd_batch.quantize.sources.vae import read_vae, rename_old_attention

# All files that any version of transformers reads for a CLIP tokenizer.
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
DECODER_ONLY_VAE = ["tinysd_batch.diffusers", "AutoencoderKLDecoder"]  # a VAE's entry in `model_index.json`


class DiffusersFolderSource:
    """A folder with `unet`, `vae` and `text_encoder`. Raises ModelError if it holds another model."""

    def __init__(self, path: Path, options: SourceOptions) -> None:
        if options.ema:
            raise ModelError(f"{path}: --ema: a model folder has no EMA copies; they come in single files")
        self.path = path
        self.options = options
        self.name = path.resolve().name
        self.report = SourceReport()
        configs = {
            component: read_json_object(path / component / file)
            for component, file in CONFIG_FILES.items()
            if (path / component / file).exists()
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
        self.read_tokenizer()  # fail now rather than after the work on the weights

    def unet(self) -> SourceComponent:
        component = read_component(self.path / "unet", "unet", self.options)
        check_unet_tensors(component)
        return component

    def vae(self) -> SourceComponent:
        if self.options.vae is not None:
            return read_vae(self.options.vae, self.options)
        component = read_component(self.path / "vae", "vae", self.options)
        component = SourceComponent(component.config, rename_old_attention(component.tensors), component.path)
        may_lack_encoder = self.is_decoder_only()
        if not has_encoder(component) and not may_lack_encoder:
            raise ModelError(f"{component.path}: the VAE has no encoder")
        check_vae_tensors(component)
        return component

    def is_decoder_only(self) -> bool:
        """Whether `model_index.json` declares that the VAE has no encoder."""
        index = self.path / PIPELINE_INDEX
        return index.exists() and read_json_object(index).get("vae") == DECODER_ONLY_VAE

    def text_encoder(self) -> SourceComponent:
        component = read_component(self.path / "text_encoder", "text_encoder", self.options)
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in component.tensors.items()}
        position_ids = [name for name in tensors if name.endswith("position_ids")]
        for name in position_ids:
            del tensors[name]
        if position_ids:
            self.report.ignored["position ids"] = len(position_ids)
        component = SourceComponent(component.config, tensors, component.path)
        check_text_encoder_tensors(component)
        return component

    def write_scheduler_and_tokenizer(self, folder: Path) -> None:
        write_json(folder / "scheduler" / "scheduler_config.json", self.scheduler)
        defaults_path = self.path / MODEL_DEFAULTS_FILE
        defaults = read_json_object(defaults_path) if defaults_path.exists() else {}
        write_json(folder / MODEL_DEFAULTS_FILE, {"name": self.name, **defaults})
        self.write_tokenizer_files(folder / "tokenizer")

    def read_tokenizer(self) -> CLIPTokenizer | None:
        """Read the folder's own tokenizer; None if it has none and its text encoder has CLIP's vocabulary.

        Raises:
            ModelError: the tokenizer cannot be read, does not fit the text encoder, or is missing though needed.
        """
        folder = self.path / "tokenizer"
        vocab_size: int = read_json_object(self.path / "text_encoder" / "config.json").get("vocab_size", VOCAB_SIZE)
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            tokenizer = read_tokenizer(folder)
            check_vocabulary(tokenizer, vocab_size, folder)
            return tokenizer
        if vocab_size != VOCAB_SIZE:
            raise ModelError(f"{self.path}: it has no tokenizer, and its text encoder is not CLIP's")
        return None

    def write_tokenizer_files(self, folder: Path) -> None:
        """Copy the folder's own tokenizer byte by byte, or write CLIP's if there is none."""
        tokenizer = self.read_tokenizer()
        if tokenizer is None:
            text_config = read_json_object(self.path / "text_encoder" / "config.json")
            write_clip_tokenizer(folder, text_config["max_position_embeddings"])
            return
        source = self.path / "tokenizer"
        folder.mkdir()
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                (folder / name).write_bytes((source / name).read_bytes())
        if not are_tokenizers_equal(tokenizer, read_tokenizer(folder)):
            raise ModelError(f"{source}: a copy of this tokenizer splits text differently; it is not supported")


def are_tokenizers_equal(tokenizer: CLIPTokenizer, other: CLIPTokenizer) -> bool:
    """Whether two tokenizers have the same tokens, special tokens and rules."""
    return bool(
        tokenizer.get_vocab() == other.get_vocab()
        and tokenizer.added_tokens_decoder == other.added_tokens_decoder
        and tokenizer.special_tokens_map == other.special_tokens_map
        and tokenizer.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    )
