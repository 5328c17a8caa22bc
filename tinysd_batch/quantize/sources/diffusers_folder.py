"""Float model folders in diffusers' layout, of any age."""

from pathlib import Path

from transformers import CLIPTokenizer

from tinysd_batch.errors import ModelError
from tinysd_batch.model.checkpoint.config_checks import CONFIGS, check_configs, sampler_notes
from tinysd_batch.model.checkpoint.folder import PIPELINE_INDEX
from tinysd_batch.model.checkpoint.info import OUR_FILE, read_defaults, read_sizes
from tinysd_batch.model.checkpoint.json_file import read_json
from tinysd_batch.model.text.tokenizer import check_vocabulary, read_tokenizer
from tinysd_batch.quantize.sources.checkpoint_source import (
    Found,
    Options,
    Part,
    check_text_encoder,
    check_unet,
    check_vae,
    has_encoder,
    write_json,
)
from tinysd_batch.quantize.sources.clip_tokenizer import VOCABULARY, write_tokenizer
from tinysd_batch.quantize.sources.component_files import read_part
from tinysd_batch.quantize.sources.ldm_config import SCHEDULER
from tinysd_batch.quantize.sources.vae import modern_attention

# All that transformers reads of a CLIP tokenizer, of any age.
TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.json",
)  # fmt: skip
DECODER_ONLY = ["tinysd_batch.diffusers", "AutoencoderKLDecoder"]


class ModelFolder:
    """A folder with `unet`, `vae` and `text_encoder`. Raises ModelError where it holds another kind of model."""

    def __init__(self, path: Path, options: Options) -> None:
        if options.ema:
            raise ModelError(f"{path}: --ema: a model folder has no EMA copies; they come in single files")
        self.path = path
        self.options = options
        self.name = path.resolve().name
        self.found = Found()
        configs = {
            part: read_json(path / part / name) for part, name in CONFIGS.items() if (path / part / name).exists()
        }
        if configs.get("unet", {}).get("quantization_config") is not None:
            raise ModelError(f"{path}: this is a packed model: it is quantized already; a float model is needed")
        if options.vae is not None:
            configs.pop("vae", None)
        check_configs(path, configs)
        read_defaults(path)
        read_sizes(path, own_vae=options.vae is None)
        self.scheduler = configs.get("scheduler", dict(SCHEDULER))
        self.found.notes += sampler_notes(self.scheduler)
        self.read_tokenizer()  # before any work is done that it would spoil

    def unet(self) -> Part:
        part = read_part(self.path / "unet", "unet", self.options)
        check_unet(part)
        return part

    def vae(self) -> Part:
        if self.options.vae is not None:
            from tinysd_batch.quantize.sources.vae import read_vae

            return read_vae(self.options.vae, self.options)
        part = read_part(self.path / "vae", "vae", self.options)
        part = Part(part.config, modern_attention(part.tensors), part.where)
        index = self.path / PIPELINE_INDEX
        without_encoder = index.exists() and read_json(index).get("vae") == DECODER_ONLY
        if not has_encoder(part) and not without_encoder:
            raise ModelError(f"{part.where}: the autoencoder has no encoder")
        check_vae(part)
        return part

    def text_encoder(self) -> Part:
        part = read_part(self.path / "text_encoder", "text_encoder", self.options)
        bare = {name.removeprefix("text_model."): value for name, value in part.tensors.items()}
        ids = [name for name in bare if name.endswith("position_ids")]
        for name in ids:
            del bare[name]
        if ids:
            self.found.left_out["position ids"] = len(ids)
        part = Part(part.config, bare, part.where)
        check_text_encoder(part)
        return part

    def write_rest(self, folder: Path) -> None:
        write_json(folder / "scheduler" / "scheduler_config.json", self.scheduler)
        ours = read_json(self.path / OUR_FILE) if (self.path / OUR_FILE).exists() else {}
        write_json(folder / OUR_FILE, {"name": self.name, **ours})
        self.write_tokenizer(folder / "tokenizer")

    def read_tokenizer(self) -> CLIPTokenizer | None:
        """The folder's own tokenizer; None where it has none and its text encoder is CLIP's. Raises ModelError."""
        source = self.path / "tokenizer"
        words: int = read_json(self.path / "text_encoder" / "config.json").get("vocab_size", VOCABULARY)
        if any((source / name).is_file() for name in TOKENIZER_FILES):
            tokenizer = read_tokenizer(source)
            check_vocabulary(tokenizer, words, source)
            return tokenizer
        if words != VOCABULARY:
            raise ModelError(f"{self.path}: it has no tokenizer, and its text encoder is not CLIP's")
        return None

    def write_tokenizer(self, folder: Path) -> None:
        """The folder's own tokenizer, as it is; CLIP's where it has none and its text encoder is CLIP's."""
        tokenizer = self.read_tokenizer()
        if tokenizer is None:
            text = read_json(self.path / "text_encoder" / "config.json")
            write_tokenizer(folder, text["max_position_embeddings"])
            return
        source = self.path / "tokenizer"
        folder.mkdir()
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                (folder / name).write_bytes((source / name).read_bytes())
        if not is_same_tokenizer(tokenizer, read_tokenizer(folder)):
            raise ModelError(f"{source}: a copy of this tokenizer reads texts in another way; it is not supported")


def is_same_tokenizer(one: CLIPTokenizer, other: CLIPTokenizer) -> bool:
    """Whether two tokenizers have the same tokens, marks and rules."""
    return bool(
        one.get_vocab() == other.get_vocab()
        and one.added_tokens_decoder == other.added_tokens_decoder
        and one.special_tokens_map == other.special_tokens_map
        and one.backend_tokenizer.to_str() == other.backend_tokenizer.to_str()
    )
