"""Generation on a GPU: the same text with guesses and without, from the predictions of the packed pass."""

import pytest
import tiny
import torch
from spoken import generate, opinionated, packed_log_probs, padded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("drafts", [0, 4])
@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "deepseek_v3"])
def test_logits_are_those_of_the_packed_pass(family, do_sample, drafts):
    model = opinionated(family).cuda()
    tokens, mask = (x.cuda() for x in padded(3, 9))
    output = generate(model, tokens, mask, drafts=drafts, do_sample=do_sample)
    expected, _ = packed_log_probs(model, output, mask)
    torch.testing.assert_close(output.logits.log_softmax(-1), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("do_sample", [False, True], ids=["greedy", "sampled"])
def test_drafts_change_no_token(do_sample):
    model, texts = opinionated("llama").cuda(), []
    for drafts in (0, 6):
        torch.manual_seed(5)
        output = generate(model, tiny.text(1, 9).cuda(), drafts=drafts, do_sample=do_sample, max_new_tokens=30)
        texts.append((output.sequences, torch.rand(3, device="cuda")))
    assert all(torch.equal(x, y) for x, y in zip(*texts, strict=True))
