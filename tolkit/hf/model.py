"""A tolkit decoder behind the face of a transformers model.

V vocabulary, D hidden, B batch, T positions of this call, S positions so far.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tolkit.errors import UsageError
from tolkit.hf.config import MemoryLlmConfig
from tolkit.hf.inputs import GrowingCache
from tolkit.hf.loading import LoadOptions, load
from tolkit.model import Decoder, RowSource, decoder_from_tensors, save_checkpoint
from tolkit.model.padding import positions_of, visible_positions

__all__ = ["MemoryLlmForCausalLM"]

_GENERATION_FILE = "generation_config.json"
_PREFIX = "decoder."


class MemoryLlmForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # no types
    """A memory or flex model, computing its token FFNs or reading their rows from a bundle.

    Attributes:
        decoder: the tolkit module that holds all weights.
        rows: where table rows come from; None when the model computes them.

    Rows are computed or read once per distinct token of a call. `inputs_embeds` cannot be given,
    because a row belongs to a token id. The vocabulary cannot be resized.
    """

    config_class = MemoryLlmConfig
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _supports_cache_class = True
    _supports_static_cache = False

    def __init__(
        self,
        config: MemoryLlmConfig,
        *,
        decoder: Decoder | None = None,
        rows: RowSource | None = None,
    ) -> None:
        super().__init__(config)
        self.decoder = Decoder(config.to_model_config()) if decoder is None else decoder
        self.rows = rows
        self._tokenizer_files: dict[str, bytes] = {}
        self._token_counts: npt.NDArray[np.uint64] | None = None
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *model_args: Any,
        config: MemoryLlmConfig | None = None,
        **kwargs: Any,
    ) -> MemoryLlmForCausalLM:
        """Load a checkpoint folder or a bundle NAME.tol, in evaluation mode.

        Args:
            pretrained_model_name_or_path: the local folder.
            config: its configuration with other settings for running; the shape must agree.
            kwargs: dtype (or torch_dtype; default: as stored), device_map (one device; default:
                the CPU). Where files are fetched from has no meaning here and is ignored.

        Raises:
            InputError and its kin: missing, damaged or unsafe files (pickle is never opened).
            UsageError: a dense checkpoint, a config of another shape, an argument not supported.
            ResourceError: no such device here.
        """
        path = Path(pretrained_model_name_or_path)
        if model_args:
            raise UsageError("from_pretrained: only keyword arguments follow the path")
        options = LoadOptions.of(kwargs)
        loaded = load(path, options)
        stored = loaded.decoder.config
        if config is None:
            config = MemoryLlmConfig.from_model_config(stored, name_or_path=str(path))
        elif _shape(config) != _shape(MemoryLlmConfig.from_model_config(stored)):
            raise UsageError(f"config: is not that of {path}, expected its shape and constants")
        dtype_key = "dtype" if hasattr(config, "dtype") else "torch_dtype"
        setattr(config, dtype_key, loaded.decoder.embedding.dtype)
        model = cls(config, decoder=loaded.decoder, rows=loaded.rows)
        model._tokenizer_files = dict(loaded.tokenizer_files)
        model._token_counts = loaded.token_counts
        if (path / _GENERATION_FILE).is_file():
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
        model.eval()
        return model

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        state_dict: dict[str, Tensor] | None = None,
        force: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write a checkpoint folder that tolkit and `from_pretrained` load with equal weights.

        Tokenizer files and token counts of the folder the model came from go along. The folder
        appears complete or not at all.

        Args:
            save_directory: a new or empty folder.
            state_dict: weights to write instead of the model's, under its parameter names.
            force: replace a checkpoint folder that is there.
            kwargs: transformers' other arguments; none changes what is written.

        Raises:
            UsageError: a bundle, whose tables are no weights; OutputExistsError: not empty.
        """
        path = Path(save_directory)
        if self.rows is not None:
            raise UsageError(
                f"{path}: a bundle cannot be saved as a checkpoint: it holds decoded table rows, "
                "not the FFN weights they came from",
                hint="copy the bundle folder, or save the checkpoint it was built from",
            )
        decoder = self.decoder
        if state_dict is not None:
            given = {name.removeprefix(_PREFIX): weight for name, weight in state_dict.items()}
            decoder = decoder_from_tensors(
                decoder.config, given.__getitem__, dtype=decoder.embedding.dtype
            )
        generation = self.generation_config.to_json_string().encode()
        empty = path.is_dir() and not any(path.iterdir())
        save_checkpoint(
            decoder,
            path,
            {**self._tokenizer_files, _GENERATION_FILE: generation},
            self._token_counts,
            force=force or empty,
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, as transformers' causal models give them.

        Args:
            input_ids: int64 [B, T].
            attention_mask: [B, S], nonzero for tokens, 0 for padding on either side.
            position_ids: int64 [B, T] or [1, T]; by default tokens of the row are counted.
            past_key_values: a transformers Cache that grows; the new positions are stored in it.
            labels: int64 [B, T], -100 where not scored; shifted here, mean loss in float32.
            logits_to_keep: how many last positions get logits (0: all), or an index of positions.
            token_type_ids: ignored; a text has one segment.

        Raises:
            UsageError: inputs_embeds, hidden states or attentions asked for, another mask shape.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        _refuse(inputs_embeds, output_hidden_states, output_attentions)
        if input_ids is None:
            raise UsageError("input_ids: missing")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if past_key_values is None and use_cache:
            past_key_values = DynamicCache()
        cache = None if past_key_values is None else GrowingCache(past_key_values)
        seen = input_ids.shape[1] + (0 if cache is None else cache.length)
        mask_BS = _padding(attention_mask, input_ids.shape[0], seen)
        if position_ids is None and mask_BS is not None:
            position_ids = positions_of(mask_BS, input_ids.shape[1])
        hidden_BTD = self.decoder.hidden(
            input_ids,
            rows=self.rows,
            cache=cache,
            positions_BT=position_ids,
            visible_B1TS=(
                None if mask_BS is None else visible_positions(mask_BS, input_ids.shape[1])
            ),
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.decoder.logits(hidden_BTD[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits_BTV, past_key_values=past_key_values
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return output if return_dict else output.to_tuple()

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding [V, D]."""
        return self.decoder.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refused: the table rows belong to the embedding they were made from."""
        raise UsageError("embedding: cannot be replaced, the token rows belong to it")

    def get_output_embeddings(self) -> nn.Module | None:
        """The head [V, D]; None where it is the embedding."""
        return self.decoder.lm_head

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refused: a new token has no rows."""
        raise UsageError("vocabulary: cannot be resized, a new token would have no table rows")

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the decoder draws its own."""


def _refuse(
    inputs_embeds: Tensor | None,
    output_hidden_states: bool | None,
    output_attentions: bool | None,
) -> None:
    if inputs_embeds is not None:
        raise UsageError(
            "inputs_embeds: not supported, the token FFN needs token ids", hint="give input_ids"
        )
    if output_hidden_states or output_attentions:
        which = "output_hidden_states" if output_hidden_states else "output_attentions"
        raise UsageError(f"{which}: not supported by memory and flex models")


def _padding(attention_mask: Tensor | None, batch: int, seen: int) -> Tensor | None:
    """The mask where it hides anything; without one the faster causal kernels are used."""
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) != (batch, seen):
        raise UsageError(
            f"attention_mask: shape {list(attention_mask.shape)}, expected {[batch, seen]} "
            "(batch, positions so far)"
        )
    return None if bool((attention_mask != 0).all()) else attention_mask


def _shape(config: MemoryLlmConfig) -> dict[str, object]:
    values = config.to_model_config().to_json()
    return {key: value for key, value in values.items() if not key.endswith("_token_id")}
