"""Tiny models built from their configurations, adapters with visible effect, and the bridge to PEFT's own code."""

from __future__ import annotations

import copy
import warnings

import peft
import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import vblora
from vblora.files import peft_format

METHODS = ("vblora", "tied_lora", "lora_xs")
# Linear layers by model: what one would adapt in each.
TARGETS = {
    "bert": ["query", "value", "dense"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "v_proj", "down_proj"],
    "stack": ["up", "down"],
}
QUERY_VALUE = {"bert": ["query", "value"], "gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "stack": ["up"]}


class Block(nn.Module):
    def __init__(self, width, inner, conv1d=False):
        super().__init__()
        self.up = Conv1D(inner, width) if conv1d else nn.Linear(width, inner)
        self.down = Conv1D(width, inner) if conv1d else nn.Linear(inner, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Stack(nn.Module):
    """Residual blocks of two linear layers, run through torch.utils.checkpoint on request."""

    def __init__(self, width=16, inner=32, layers=2, conv1d=False):
        super().__init__()
        self.embed = nn.Linear(5, width)
        self.layers = nn.ModuleList(Block(width, inner, conv1d) for _ in range(layers))
        self.use_reentrant = None

    def forward(self, x):
        x = self.embed(x)
        if self.use_reentrant:
            x = x.requires_grad_()  # what the reentrant form asks of its caller
        for layer in self.layers:
            if self.use_reentrant is None:
                x = layer(x)
            else:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x


def build(kind, hidden=32, layers=2, seed=0, **settings):
    """A tiny model of an architecture: "bert" (a classifier), "gpt2", "llama", "stack" or "stack_conv1d"."""
    torch.manual_seed(seed)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=50,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=32,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            initializer_range=0.2,
            **settings,
        )
        model = transformers.BertForSequenceClassification(config)
    elif kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=50,
            n_embd=hidden,
            n_layer=layers,
            n_head=2,
            n_positions=48,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=None,
            **settings,
        )
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        config = transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=48,
            initializer_range=0.2,
            bos_token_id=0,
            eos_token_id=None,
            pad_token_id=None,
            **settings,
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        model = Stack(hidden, 2 * hidden, layers, conv1d=kind == "stack_conv1d")
    return model.eval()


def make_batch(kind, rows=3, length=6, seed=0):
    """Inputs by keyword for a model of `build`."""
    generator = torch.Generator().manual_seed(seed)
    if kind.startswith("stack"):
        return {"x": torch.randn(rows, length, 5, generator=generator)}
    return {"input_ids": torch.randint(1, 50, (rows, length), generator=generator)}


def run(model, batch):
    """The model's output as one tensor."""
    output = model(**batch)
    return output if isinstance(output, torch.Tensor) else output.logits


def config_for(method, kind="stack", **settings):
    """A configuration of one of our methods that fits the tiny models."""
    settings = {"r": 2, "target_modules": TARGETS[kind.removesuffix("_conv1d")], **settings}
    if method == "vblora":
        defaults = {"num_vectors": 12, "vector_length": 8, "init_vector_bank_bound": 0.6, "init_logits_std": 1.0}
        return vblora.VBLoRAConfig(**{**defaults, **settings})
    return {"tied_lora": vblora.TiedLoRAConfig, "lora_xs": vblora.LoRAXSConfig}[method](**settings)


def stir(adapter, seed=1):
    """Make the adapter of a method that starts at zero change the output visibly."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if name.startswith(("factor_b", "mixing")):
                parameter.normal_(generator=generator).mul_(0.2)
    return adapter


def adapt(model, method="vblora", kind="stack", name=None, seed=3, **settings):
    return stir(vblora.attach(model, config_for(method, kind, **settings), name=name, seed=seed))


def groups_for(model, lr=1e-2, weight_decay=0.0):
    """Parameter groups of any of our methods, all at one rate."""
    kinds = {type(a.config).method for a in model.modules() if isinstance(a, vblora.Adapter)}
    rates = {"lr_vector_bank": lr, "lr_logits": lr} if "vblora" in kinds else {}
    return vblora.param_groups(model, lr=lr, weight_decay=weight_decay, **rates)


def snapshot(model):
    """All that attaching or loading could change in a model, to compare before and after."""
    return {
        "state": {key: t.clone() for key, t in model.state_dict().items()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "modules": {name: id(module) for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._forward_hooks_with_kwargs))
            for name, module in model.named_modules()
        },
        "attributes": set(vars(model)) | set(model._modules),
        "training": model.training,
    }


def assert_unchanged(model, before):
    after = snapshot(model)
    state, other = before.pop("state"), after.pop("state")
    assert list(state) == list(other)
    assert [key for key in state if not torch.equal(state[key], other[key])] == []
    assert after == before


def gradients(adapter):
    return {name: p.grad.clone() for name, p in adapter.named_parameters()}


# --- PEFT's VB-LoRA with our parameters --------------------------------------------------------------------------


def peft_twin(base, adapter, **settings):
    """PEFT's VB-LoRA on a copy of `base`, with the parameters of `adapter`."""
    config = adapter.config
    peft_config = peft.VBLoRAConfig(
        r=config.r,
        num_vectors=config.num_vectors,
        vector_length=config.vector_length,
        topk=config.topk,
        target_modules=config.target_modules,
        modules_to_save=config.modules_to_save,
        vblora_dropout=config.vblora_dropout,
        save_only_topk_weights=False,
        **settings,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
        twin = peft.get_peft_model(copy.deepcopy(base), peft_config)
    native = {"vector_bank": adapter.vector_bank.detach(), "logits": adapter.dense_logits()}
    wanted = peft_format.to_peft(native, config, adapter.shapes)
    parameters = peft_tensors(twin)
    assert set(parameters) == set(wanted)
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.data = wanted[key].detach().clone()
    return twin.eval() if not base.training else twin.train()


def peft_tensors(twin):
    """PEFT's VB-LoRA parameters by the names of its files."""
    found = {}
    for name, parameter in twin.named_parameters():
        if "vblora_vector_bank" in name:  # one parameter, reachable through every layer
            found[peft_format.BANK] = parameter
        elif "vblora_logits" in name:
            found[name.removesuffix(".default")] = parameter
    return found


def peft_native(twin, adapter, gradient=False):
    """PEFT's parameters, or their gradients, in our layout: "vector_bank" (h, b) and "logits" (N, h)."""
    tensors = {key: (p.grad if gradient else p.detach()) for key, p in peft_tensors(twin).items()}
    return peft_format.from_peft(tensors, adapter.config, adapter.shapes)
