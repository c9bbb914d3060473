"""Checked access to the keys of a Hugging Face `config.json`: what is missing or of the wrong kind is a UserError."""

from __future__ import annotations

from typing import Any, get_args, get_type_hints

from simulator.errors import UserError, nearest
from simulator.model import RopeScaling

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip


_ROPE_TYPES = get_args(get_type_hints(RopeScaling)["rope_type"])

# No size of a model comes near; beyond it floats lose count.
LARGEST = 2**40


class Config:
    """A `config.json` with checked access: missing keys and values of the wrong kind are the user's error."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def integer(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """The first of these keys that is present and not null; the later ones are aliases."""
        for key in keys:
            value = self.data.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < LARGEST:
                raise UserError(f"{self.where}: {key} = {repr(value)[:40]} must be an integer of at least {least}")
            return value
        if default is None:
            if keys[0] in self.data:
                raise UserError(f"{self.where}: {keys[0]} = null must be an integer of at least {least}")
            raise UserError(f"{self.where}: the key '{keys[0]}' is missing{missing_hint(keys[0], self.data)}")
        return default

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {key} = {value!r} must be true or false")
        return value

    def number(self, *keys: str, default: float) -> float:
        for key in keys:
            value = self.data.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise UserError(f"{self.where}: {key} = {value!r} must be a positive number")
            return float(value)
        return default

    def activation(self, *keys: str, default: str) -> Any:
        name = next((self.data[k] for k in keys if self.data.get(k) is not None), default)
        if str(name) not in ACTIVATIONS:
            raise UserError(f"{self.where}: {keys[0]} = {name!r} is not known{nearest(str(name), ACTIVATIONS)}")
        return ACTIVATIONS[name]

    def rope_theta(self, default: float = 10000.0) -> float:
        """transformers 5 moved `rope_theta` into `rope_parameters`."""
        inner = self.data.get("rope_parameters")
        if isinstance(inner, dict) and "rope_theta" in inner:
            return Config(inner, self.where).number("rope_theta", default=default)
        return self.number("rope_theta", "rotary_emb_base", default=default)

    def rope_scaling(self) -> RopeScaling | None:
        """`rope_scaling` of transformers 4, which 5 moved into `rope_parameters`; None where nothing is scaled."""
        key = next((k for k in ("rope_scaling", "rope_parameters") if self.data.get(k)), "rope_scaling")
        inner = self.data.get(key) or {}
        if not isinstance(inner, dict):
            raise UserError(f"{self.where}: {key} = {inner!r} must be a table with a rope_type")
        kind = str(inner.get("rope_type", inner.get("type", "default")))
        if kind == "default":
            return None
        if kind not in _ROPE_TYPES:
            raise UserError(f"{self.where}: {key}.rope_type = {kind!r} is not known{nearest(kind, _ROPE_TYPES)}")
        read = Config(inner, f"{self.where}: {key}")
        longest = self.integer("original_max_position_embeddings", "max_position_embeddings", default=8192)
        return RopeScaling(
            rope_type=kind,  # type: ignore[arg-type]  # one of _ROPE_TYPES
            factor=read.number("factor", default=1.0),
            low_freq_factor=read.number("low_freq_factor", default=1.0),
            high_freq_factor=read.number("high_freq_factor", default=4.0),
            original_max_position_embeddings=read.integer("original_max_position_embeddings", default=longest),
        )

    def refuse(self, key: str, plain: object, why: str) -> None:
        """Raise UserError where a switch of the architecture is not at its plain value."""
        value = self.data.get(key)
        if value is not None and value != plain:
            raise UserError(f"{self.where}: {key} = {value!r} is not supported: {why}")


def missing_hint(key: str, data: dict[str, Any]) -> str:
    """A similar key that is there, for a message about one that is not; empty if there is none."""
    hint = nearest(key, data)
    return hint if "did you mean" in hint else ""
