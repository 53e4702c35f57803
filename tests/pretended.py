"""Two devices that are not there: tensors without data, which refuse to mix devices. Run by tests/test_placement.py in
a process of its own, since torch does not forget a pretended kind of device; prints where things came to lie, as JSON.
"""

import importlib
import json

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoModelForCausalLM

from prime.bank.bank import AdapterBank
from prime.bank.batching import every_pair
from prime.bank.cache import RoomyCache
from prime.bank.decode import Request, decode
from prime.bank.encoding import EncodedRecord
from prime.bank.logprobs import target_logprobs
from prime.bank.lora import layer_of
from prime.bank.sampling import Sampler, gumbel
from prime.merging.gates import Gates, compose
from tests import tiny

KIND = "privateuseone"
PARTS = {
    "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "model.rotary_emb": 0,
    "lm_head": 1,
}  # fmt: skip
# Of two prompts in three the beginning is shared: prefixes are computed apart, and copied to the rows' caches.
RECORDS = [EncodedRecord(f"r{i}", (1, *range(5, 25), *tiny.text_ids(i, 4, 20)[1:]), (5, 6 + i, 7, 2)) for i in range(6)]


class Pretending(FakeTensorMode):
    avoid_device_init = True  # constants are made on the CPU, then moved


class Choosing(Sampler):
    """Chooses by position, since logits without data have no largest one; the chosen tokens are real."""

    def choose(self, logits: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        torch.log_softmax(logits.float(), -1) + gumbel(keys, positions, logits.shape[-1])
        with unset_fake_temporarily():
            return torch.arange(len(logits)) % 7


def parted(base: nn.Module) -> nn.Module:
    """A model of the base's configuration on both devices; accelerate has its hooks to set only."""
    model = AutoModelForCausalLM.from_config(base.config, dtype=torch.float32).eval()
    parts = {name: f"{KIND}:{place}" for name, place in PARTS.items()}
    for name, place in parts.items():
        for module in model.get_submodule(name).modules():
            for key, weight in module.named_parameters(recurse=False):
                setattr(module, key, nn.Parameter(torch.empty_like(weight, device=place), requires_grad=False))
            for key, buffer in module.named_buffers(recurse=False):
                setattr(module, key, torch.empty_like(buffer, device=place))
    skipped = model._skip_keys_device_placement
    return dispatch_model(model, parts, main_device=parts["model.embed_tokens"], skip_keys=skipped)


def work(base: nn.Module, bank: AdapterBank) -> None:
    """Scoring, composing, decoding. Without their inference mode, in which torch would compute with constants."""
    adapters = [tiny.adapter(base, seed) for seed in range(3)]
    bank.load(adapters)
    target_logprobs.__wrapped__(bank, RECORDS, every_pair([-1, 0, 1], len(RECORDS)), 400)
    compose.__wrapped__(bank, Gates.zeros(bank), [RECORDS], 2, 0.5)
    bank.load(adapters)
    bank.combine(torch.ones(2, 3), "delta")
    drafts = [[record.target[:-1]] for record in RECORDS]
    request = Request(RECORDS, every_pair([0, 1], len(RECORDS)), Choosing(), 6, drafts)
    decode.__wrapped__(bank, request, [2], 400)


def places(bank: AdapterBank) -> dict[str, list[str]]:
    """Devices of a bank's factors and of a cache, by layer."""
    cache = RoomyCache()
    tokens = torch.zeros(2, 5, dtype=torch.long, device=bank.device)
    logits = bank.model(input_ids=tokens, past_key_values=cache).logits
    cache.keep([1], 2)
    factors, held = set(), set()
    for name, wrapper in bank.wrappers.items():
        factors |= {f"{layer_of(name)} {factor.device}" for factor in (wrapper.A, wrapper.B)}
    for layer, keys_and_values in enumerate(cache.pairs()):
        held |= {f"{layer} {tensor.device}" for tensor in keys_and_values}
    return {"ends": [str(bank.device), str(logits.device)], "factors": sorted(factors), "cache": sorted(held)}


def main() -> None:
    _setup_privateuseone_for_python_backend()
    base = tiny.model()
    for module in ("logprobs", "decode"):  # logits without data are neither finite nor not
        importlib.import_module(f"prime.bank.{module}").check_finite = lambda *_: None
    with Pretending(), torch.no_grad():
        bank = AdapterBank(parted(base))
        work(base, bank)
        print(json.dumps(places(bank)))


if __name__ == "__main__":
    main()
