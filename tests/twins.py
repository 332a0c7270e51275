"""One model twice, with something that must not change its law, and without."""

import copy

import torch

from blockroll.policies.hf import HFPolicy
from blockroll.rollout.engine.cache.slots import SlotCache
from tests.models import VOCAB_SIZE, random_adapter, random_model


def twins(option, family="llama", *, dtype=torch.float32, with_adapter=False, **others):
    """Policies of one model with an option `on`, and `off`."""
    made = []
    for value in ("on", "off"):
        policy = HFPolicy(random_model(family).to(dtype), **{option: value}, **others)
        if with_adapter:
            policy.use_adapter(random_adapter(policy))
        made.append(policy)
    return made


def biased_model(bias):
    """A model whose modules of a kind, `attention_bias` or `mlp_bias`, add one."""
    model = random_model()
    config = copy.deepcopy(model.config)
    setattr(config, bias, True)
    model = type(model)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def laws(policy):
    """Log-probabilities of every kind of forward, behind rows that a prefill wrote."""
    torch.manual_seed(1)
    ids_BR = torch.randint(4, VOCAB_SIZE, (3, 13))

    def window(num_rows):
        cache = SlotCache(policy, num_slots=3, capacity=48)
        policy.prefill(ids_BR[:, :9], cache.window(0, 3, 9))
        cache.commit(0, ids_BR[:, :9].tolist())
        return cache.window(0, 3, num_rows)

    block_BL = ids_BR[:, 9:]
    rows = [policy.verify_logits(block_BL, window(4)), policy.draft_logits(block_BL[:, :1], 3, window(4))]
    fused = policy.fused_rows(block_BL, (0, 3), window(12))
    rows += [fused.verify_logits_BLV, policy.proposal_logits(fused.proposal_states_BPLW[:, 1])]
    return torch.cat([each.log_softmax(-1) for each in rows], dim=1)


def assert_same_laws(policy, other):
    assert float((laws(policy) - laws(other)).abs().max()) <= 1e-4
