"""The configuration of an exported xLSTM, as transformers reads and writes it."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from xlstm_lm.models.xlstm_config import XLSTMConfig


class XLSTMLMConfig(PreTrainedConfig):
    """The fields of `XLSTMConfig` by their own names, and by transformers' where it has one for the same thing."""

    model_type = "xlstm_lm"
    keys_to_ignore_at_inference = ["cache_params"]  # noqa: RUF012 -- transformers would take a ClassVar for a field
    attribute_map = {  # noqa: RUF012
        "hidden_size": "embedding_dim",
        "num_hidden_layers": "num_blocks",
        "num_attention_heads": "num_heads",
        "tie_word_embeddings": "tie_embeddings",
    }

    def __init__(self, use_cache: bool = True, **values: Any) -> None:
        """`values` are fields of `XLSTMConfig`, in either's names, and whatever transformers keeps in a configuration.

        Raises:
            ValueError: the sizes do not fit each other.
        """
        values = {self.attribute_map.get(name, name): value for name, value in values.items()}
        names = {field.name for field in dataclasses.fields(XLSTMConfig)}
        model = XLSTMConfig(**{name: values.pop(name) for name in names & values.keys()})
        for name, value in dataclasses.asdict(model).items():
            setattr(self, name, value)
        self.use_cache = use_cache
        if __name__ == "xlstm_lm.hub.configuration_xlstm_lm":
            values.pop("auto_map", None)  # what is saved from here brings no code along, unlike an export
        super().__init__(**values)

    def model_config(self) -> XLSTMConfig:
        """The same model as the rest of xlstm-lm describes it."""
        return XLSTMConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(XLSTMConfig)})

    def save_pretrained(self, *arguments: Any, **options: Any) -> Any:
        """As for every configuration, but `architectures` names the Auto class that finds the model's own.

        `transformers serve` and TRL look for that name in the transformers package, where remote code is not.
        """
        auto = {"XLSTMLMModel": "AutoModel", "XLSTMLMForCausalLM": "AutoModelForCausalLM"}
        self.architectures = [auto.get(name, name) for name in self.architectures or []] or None
        return super().save_pretrained(*arguments, **options)
