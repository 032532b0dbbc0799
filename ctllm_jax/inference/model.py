"""A MODEL loaded for commands: its weights, decoder and tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ctllm_jax import sharding
from ctllm_jax.config.errors import UserError
from ctllm_jax.config.generate import DrawingConfig
from ctllm_jax.config.model import MeshConfig
from ctllm_jax.config.sft import TemplateConfig
from ctllm_jax.data.chat import ChatTemplate, Message
from ctllm_jax.data.templates import open_template
from ctllm_jax.data.tokenizer import Tokenizer
from ctllm_jax.huggingface.tokenizer import read_drawing
from ctllm_jax.inference.engine import Engine
from ctllm_jax.inference.request import MOST_STOP_IDS, Request
from ctllm_jax.inference.schedule import rounded
from ctllm_jax.model.decoder import Decoder, init_params
from ctllm_jax.model.parameters import decoder_parameters
from ctllm_jax.training.checkpoints.checkpoint import find_checkpoint, load_params, load_whole, read_model_config
from ctllm_jax.training.tuning import check_template, open_text

Drawing = TypeVar("Drawing", bound=DrawingConfig)


@dataclass(frozen=True)
class Model:
    """A trained model.

    Attributes:
      prefix_id: id that preceded documents in training; None if there was none.
      stop_id: id that ends a document.
      template: the chat template that it was trained with; None if it was trained without one.
      mesh: the mesh that `params` are sharded over; None: one device.
      more_stop_ids: further ids that end a text: an imported model may have several.
      drawing: sampling defaults of the model's generation_config.json.
    """

    decoder: Decoder
    params: Any
    tokenizer: Tokenizer
    prefix_id: int | None
    stop_id: int | None
    run_dir: Path
    step: int
    template: ChatTemplate | None = None
    mesh: Mesh | None = None
    more_stop_ids: Sequence[int] = ()
    drawing: dict[str, Any] = field(default_factory=dict)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end generated text."""
        ends = [] if self.stop_id is None else [self.stop_id]
        return tuple(dict.fromkeys([*(self.template.stop_ids if self.template else ()), *ends, *self.more_stop_ids]))

    def drawn_as(self, config: Drawing) -> Drawing:
        """A config of `generate` or `chat`, with the model's sampling defaults for keys that were not given."""
        return config.model_copy(update={name: value for name, value in self.drawing.items()
                                         if name not in config.model_fields_set})

    def engine(self, **options: Any) -> Engine:
        """An engine of this model; options as for `Engine`."""
        return Engine(self.decoder, self.params, tokenizer=self.tokenizer, mesh=self.mesh, **options)

    def complete(self, prompts: Sequence[str], *, max_tokens: int, seed: int = 0, **drawing: Any) -> list[str]:
        """The model's continuation of each prompt; `drawing`: further fields of `Request`, the same for all."""
        ids = encode_prompts(self.tokenizer, prompts, prefix_id=self.prefix_id, stop_id=self.stop_id)
        requests = [Request(prompt=tuple(prompt), max_tokens=max_tokens, seed=seed, row=row,
                            stop_ids=self.stop_ids, **drawing) for row, prompt in enumerate(ids)]
        engine = self.engine(**rounded(len(ids), max(map(len, ids)) + max_tokens))
        return [text for _, text, _ in engine.run(requests)]


def with_template(model: Model, config: TemplateConfig, *, name: str) -> Model:
    """The model with a template that it was not trained with; `name` is the MODEL that it was loaded from.

    Raises:
      UserError: it was trained with another one, or the model lacks ids of the template.
    """
    template = open_template(config, model.tokenizer)
    _, kept = find_checkpoint(name)
    check_template(kept.meta.get("template"), config, template, name=name, field="template")
    largest = max([*template.prompt_ids([Message("user", "")]), *template.stop_ids])
    if largest >= model.decoder.config.vocab_size:
        raise UserError(f"template={config.kind} has the id {largest}, and {name} has ids up to "
                        f"{model.decoder.config.vocab_size - 1} only")
    return replace(model, template=template)


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str], *, prefix_id: int | None,
                   stop_id: int | None) -> list[list[int]]:
    """Ids of prompts as in training; an empty prompt starts after the end of another document.

    Raises:
      UserError: the prompt is empty, and no id begins a document.
    """
    rows = []
    for prompt in prompts:
        ids = tokenizer.encode(prompt)
        prefix = prefix_id if ids else (stop_id if prefix_id is None else prefix_id)
        if not ids and prefix is None:
            raise UserError("prompt is empty, and this model has no id that begins a document: give it some text")
        rows.append(([] if prefix is None else [prefix]) + ids)
    return rows


def decode_completion(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens after a prompt; a character that the prompt's last bytes begin is kept whole."""
    before = tokenizer.decode(list(prompt))
    text = tokenizer.decode([*prompt, *new])
    return text[len(before):] if text.startswith(before) else tokenizer.decode(list(new))


def load_model(model: str, *, dtype: str = "float32", mesh: MeshConfig | None = None) -> Model:
    """Load a MODEL (a run directory, RUN@STEP, a Hugging Face folder), parameters in float32, adapters merged.

    Args:
      dtype: dtype of computation.
      mesh: devices that it is sharded over; None: the first device.

    Raises:
      UserError: there is no such run, step or tokenizer.
    """
    run_dir, kept = find_checkpoint(model)
    config = read_model_config(run_dir)
    tokenizer, template = open_text(kept)
    decoder = Decoder(config, dtype=jnp.dtype(dtype))
    rest = (tokenizer, kept.meta.get("prefix_id"), kept.meta.get("eod_id"), run_dir, kept.step, template)
    more = {"more_stop_ids": kept.meta.get("stop_ids", ()), "drawing": read_drawing(kept.meta.get("generation", {}))}
    if mesh is None:
        return _checked(Model(decoder, load_whole(kept), *rest, **more))
    devices = sharding.make_mesh(mesh.model_dump())
    shapes = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    placed = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes,
                          sharding.param_shardings(decoder_parameters(config), devices))
    decoder = decoder.clone(swiglu=sharding.swiglu_on(None, implementation="auto", recompute=False))
    return _checked(Model(decoder, load_params(kept, placed), *rest, mesh=devices, **more))


def _checked(model: Model) -> Model:
    if len(model.stop_ids) > MOST_STOP_IDS:
        raise UserError(f"{model.run_dir}: {len(model.stop_ids)} ids end a text, and at most {MOST_STOP_IDS} are looked"
                        f" for: {', '.join(map(str, model.stop_ids))}")
    return model


def fingerprint(model: Model) -> str:
    """Hash of weights, architecture, tokenizer and template, 16 hexadecimal digits."""
    digest = hashlib.sha256(json.dumps([model.decoder.config.model_dump(mode="json"), model.tokenizer.sha256,
                                        model.template and model.template.fingerprint()], sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8))
    return digest.hexdigest()[:16]
