"""Keep the text encoder's token embedding on the host: a prompt needs 77 of its 49,408 rows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextModel

from tinysd_batch.model.offload.components import get_checked_tensor


class HostEmbedding(nn.Module):
    """`nn.Embedding` whose table stays on the host; only the rows that are looked up go to the device, as `dtype`."""

    def __init__(self, table: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.tables = (table,)  # in a tuple, so that it is not registered as a parameter that would be moved
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        if ids.is_meta:
            return torch.empty(*ids.shape, self.tables[0].shape[1], dtype=self.dtype, device=ids.device)
        rows = F.embedding(ids.to(self.tables[0].device), self.tables[0])
        return rows.to(ids.device, self.dtype)


def keep_vocabulary_on_host(encoder: CLIPTextModel, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Move the token embedding's table from `tensors` into an empty encoder. Raises ModelError."""
    name = "embeddings.token_embedding.weight"
    table = get_checked_tensor(tensors, name, encoder.get_parameter(name))
    del tensors[name]
    encoder.embeddings.token_embedding = HostEmbedding(table, dtype)
