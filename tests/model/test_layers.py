"""Every layer of transformers whose code is known, patched, against the model itself and float64."""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
import transformers.models
from torch import nn

import mlpdown
from mlpdown.patching.code import UnknownCode
from mlpdown.patching.forms import LAYERS, recognise

from .conftest import randomise

TOKEN = torch.tensor([[3]])

# One class of each form of a layer and of an MLP, with what makes its configuration take the other branch where there are two.
FORMS: dict[str, dict[str, Any]] = {
    "llama.LlamaDecoderLayer": {},
    "gpt_neox.GPTNeoXLayer": {"use_parallel_residual": True},
    "gpt_neox.GPTNeoXLayer, sequential": {"use_parallel_residual": False},
    "phi.PhiDecoderLayer": {},
    "phi3.Phi3DecoderLayer": {},
    "gptj.GPTJBlock": {},
    "codegen.CodeGenBlock": {},
    "cohere.CohereDecoderLayer": {},
    "cohere2.Cohere2DecoderLayer": {},
    "stablelm.StableLmDecoderLayer": {"use_parallel_residual": False},
    "stablelm.StableLmDecoderLayer, parallel": {"use_parallel_residual": True},
    "nemotron.NemotronDecoderLayer": {},
    "persimmon.PersimmonDecoderLayer": {},
    "qwen2_vl.Qwen2VLDecoderLayer": {},
    "qwen2_5_omni.Qwen2_5OmniDecoderLayer": {},
    "glm.GlmDecoderLayer": {},
    "starcoder2.Starcoder2DecoderLayer": {},
    "seed_oss.SeedOssDecoderLayer": {},
    "arcee.ArceeDecoderLayer": {},
}
# What a configuration is told, of this what it knows.
TINY: dict[str, Any] = dict(
    vocab_size=128,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=160,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    layer_types=None,
    # GPT-J and CodeGen
    n_embd=64,
    n_layer=2,
    n_head=4,
    n_inner=160,
    n_positions=64,
    rotary_dim=8,
    # mixtures of experts, whose first layers are dense
    moe_intermediate_size=64,
    num_experts=4,
    n_routed_experts=4,
    num_local_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    # latent attention
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=16,
    qk_nope_head_dim=8,
    v_head_dim=16,
)


def tiny_config(config_class: Any, **changes: Any) -> Any:
    default = config_class()
    settings = {name: value for name, value in TINY.items() if hasattr(default, name)}
    config = config_class(**{**settings, **changes})
    config._experts_implementation = config._attn_implementation = "eager"  # the other experts take no float64
    return config


def tiny_model(layer_class: type[nn.Module], **changes: Any) -> Any:
    """A random model in float16 that is made of layers of this class."""
    module: Any = inspect.getmodule(layer_class)
    reason = "no model in its module makes it"
    for model_class in vars(module).values():
        if not (inspect.isclass(model_class) and issubclass(model_class, transformers.PreTrainedModel)):
            continue
        if model_class.config_class is None or f"{layer_class.__name__}(" not in inspect.getsource(
            model_class.__init__
        ):
            continue
        try:
            if "mrope_section" in inspect.getsource(module):
                name = "rope_parameters" if hasattr(model_class.config_class(), "rope_parameters") else "rope_scaling"
                changes[name] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
            torch.manual_seed(0)
            model = model_class._from_config(tiny_config(model_class.config_class, **changes))
            return randomise(model).half().eval()
        except Exception as error:  # noqa: BLE001 - every model has demands of its own
            reason = f"{model_class.__name__}: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
    raise ValueError(reason)


class Alone(nn.Module):
    """A layer by itself, for classes whose models want images, sound or more than a configuration."""

    def __init__(self, layer_class: type[nn.Module], **changes: Any) -> None:
        super().__init__()
        module: Any = inspect.getmodule(layer_class)
        parameters = inspect.signature(layer_class.__init__).parameters
        annotated = parameters["config"].annotation
        config_classes = [vars(module).get(annotated) if isinstance(annotated, str) else annotated]
        config_classes += [getattr(model_class, "config_class", None) for model_class in vars(module).values()]
        reason: Exception = ValueError("its configuration is not to be found")
        for config_class in dict.fromkeys(each for each in config_classes if inspect.isclass(each)):
            try:
                config = tiny_config(config_class, **changes)
                torch.manual_seed(0)
                layer = layer_class(config, **({"layer_idx": 0} if "layer_idx" in parameters else {}))
                break
            except Exception as error:  # noqa: BLE001 - the next may be the layer's
                reason = error
        else:
            raise reason
        self.layers = nn.ModuleList([layer])
        randomise(self)
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def forward(self, token: torch.Tensor, use_cache: bool) -> Any:
        generator = torch.Generator().manual_seed(1)
        dtype = next(self.parameters()).dtype
        # Of 16 bits for every dtype, so that a float64 model is given the same.
        states, angles = (torch.randn(1, 1, size, generator=generator).half().to(dtype) for size in (64, self.head_dim))
        position_embeddings = angles.cos(), angles.sin()
        out = self.layers[0](states, attention_mask=None, position_embeddings=position_embeddings)
        return out if isinstance(out, tuple) else (out,)


def tiny_layer(layer_class: type[nn.Module], **changes: Any) -> Any:
    return Alone(layer_class, **changes).half().eval()


@torch.no_grad()
def states(model: Any) -> torch.Tensor:
    return model(TOKEN, use_cache=False)[0].double()


def patched_against_stock(model: Any, patched: str = "numba") -> mlpdown.patching.PatchReport:
    """Patch a model, hold what one token gives to the bound, and undo it.

    The op rounds once where the model rounds up to three times, so its result may not be farther from float64 than the model's own, but for
    the one rounding a layer that both have and that may fall otherwise.
    """
    own = states(model)
    exact_model = copy.deepcopy(model).double()
    exact = states(exact_model)
    generator = torch.Generator().manual_seed(0)

    def rounded_half_an_ulp_away(module: nn.Module, inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        signs = torch.randint(0, 2, first.shape, generator=generator, dtype=torch.float64) * 2 - 1
        moved = first * (1 + signs * torch.finfo(torch.float16).eps / 2)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    with mlpdown.patch(model, backend=patched) as handle:
        for name in {name for name, _ in handle._layers}:
            exact_model.get_submodule(name).register_forward_hook(rounded_half_an_ulp_away)
        actual = states(model)
        assert handle.calls.get(patched, 0) == handle.report.num_patched, handle.calls
    one_rounding = (states(exact_model) - exact).norm()
    assert (actual - exact).norm() <= (own - exact).norm() + one_rounding
    assert torch.equal(states(model), own), "undone, the model is what it was"
    return handle.report


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_within_the_rounding_of_the_model_itself(form: str) -> None:
    folder, _, name = form.partition(",")[0].partition(".")
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    model = tiny_model(getattr(module, name), **FORMS[form])
    report = patched_against_stock(model)
    assert report.num_patched == report.num_layers == 2, report


def layers_of_known_code() -> Iterator[type[nn.Module]]:
    for folder in sorted(each.name for each in pkgutil.iter_modules(transformers.models.__path__)):
        package = importlib.import_module(f"transformers.models.{folder}")
        for each in pkgutil.iter_modules(package.__path__):
            if not each.name.startswith("modeling_") or each.name.startswith(("modeling_tf_", "modeling_flax_")):
                continue
            try:
                module = importlib.import_module(f"{package.__name__}.{each.name}")
            except ImportError:
                continue  # it needs what is not installed
            for value in list(vars(module).values()):
                if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__:
                    try:
                        recognise(value, LAYERS)
                    except UnknownCode:
                        continue
                    yield value


@pytest.mark.slow
def test_every_layer_of_transformers_that_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    same, elsewhere, not_made = [], {}, {}
    for layer_class in layers_of_known_code():
        name = f"{layer_class.__module__.split('.')[2]}.{layer_class.__name__}"
        # Latent attention wants as many heads of one kind as of the other.
        for make, num_key_value_heads in itertools.product((tiny_model, tiny_layer), (2, 4)):
            try:
                model = make(layer_class, num_key_value_heads=num_key_value_heads)
                states(model), states(copy.deepcopy(model).double())
                break
            except Exception as error:  # noqa: BLE001 - what has no tiny model that takes one token is listed
                not_made[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}"
        else:
            continue
        not_made.pop(name, None)
        with mlpdown.patch(model) as handle:
            report = handle.report
        if report.num_patched:
            patched_against_stock(model)
            same.append(name)
        else:
            elsewhere[name] = next(iter(report.skipped.values())).splitlines()[0][:120]
    with capsys.disabled():
        print(
            f"\ntransformers {transformers.__version__}: {len(same)} classes of layers are patched, and within the bound:"
        )
        print("  " + ", ".join(same))
        untested = "known, and neither a tiny model nor the layer alone takes one token"
        for title, names in (("layers known, MLP not", elsewhere), (untested, not_made)):
            print(f"{len(names)} {title}:")
            print("\n".join(f"  {name}: {reason}" for name, reason in names.items()))
    expected = {form.partition(",")[0] for form in FORMS}
    assert expected <= set(same)
    assert len(same) >= (30 if transformers.__version__.startswith("4.") else 60)
