"""The configuration of an exported xLSTM, as transformers reads and writes it."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from xlstm_lm.models.xlstm_config import HybridConfig, XLSTMConfig

CONFIGS = {"xlstm": XLSTMConfig, "hybrid": HybridConfig}
"""Configuration of each family that this format holds. All have the same fields."""


class XLSTMLMConfig(PreTrainedConfig):
    """The fields of `XLSTMConfig` by their own names, and by transformers' where it has one for the same thing."""

    model_type = "xlstm_lm"
    keys_to_ignore_at_inference = ["cache", "cache_params"]  # noqa: RUF012 -- a ClassVar would become a field
    attribute_map = {  # noqa: RUF012
        "hidden_size": "embedding_dim",
        "num_hidden_layers": "num_blocks",
        "num_attention_heads": "num_heads",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, use_cache: bool = True, **values: Any) -> None:
        """`values` are fields of `XLSTMConfig`, in either's names, and whatever transformers keeps in a configuration.

        Raises:
            ValueError: the sizes do not fit each other, or a size has two values under its two names.
        """
        for theirs, ours in self.attribute_map.items():
            if theirs in values and values.setdefault(ours, values[theirs]) != values[theirs]:
                raise ValueError(
                    f"{theirs} is {values[theirs]} and {ours} is {values[ours]}, but they are two names of one value; "
                    "change both, or leave one out."
                )
            values.pop(theirs, None)
        names = {field.name for field in dataclasses.fields(XLSTMConfig)}
        model = _config_class(values)(**{name: values.pop(name) for name in names & values.keys()})
        for name, value in dataclasses.asdict(model).items():
            setattr(self, name, value)
        self.use_cache = use_cache
        if __name__ == "xlstm_lm.hub.configuration_xlstm_lm":
            values.pop("auto_map", None)  # what is saved from here brings no code along, unlike an export
        super().__init__(**values)

    def to_dict(self) -> dict[str, Any]:
        """Fields under our names and under transformers', for tools that read config.json alone."""
        return super().to_dict() | {theirs: getattr(self, theirs) for theirs in self.attribute_map}

    def model_config(self) -> XLSTMConfig:
        """The same model as the rest of xlstm-lm describes it."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(XLSTMConfig)}
        return _config_class(values)(**values)

    def save_pretrained(self, *arguments: Any, **options: Any) -> Any:
        """Save with the Auto class that finds the model's own in `architectures`.

        `transformers serve` and TRL look for that name in the transformers package, where remote code is not.
        """
        auto = {"XLSTMLMModel": "AutoModel", "XLSTMLMForCausalLM": "AutoModelForCausalLM"}
        self.architectures = [auto.get(name, name) for name in self.architectures or []] or None
        return super().save_pretrained(*arguments, **options)


def _config_class(values: dict[str, Any]) -> type[XLSTMConfig]:
    family = values.get("family", "xlstm")
    if family not in CONFIGS:
        raise ValueError(f"family is {family!r}; it must be one of {', '.join(CONFIGS)}.")
    return CONFIGS[family]
