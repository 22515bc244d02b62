"""Decisions: the choice that a language model finds most likely after a prompt, as evaluate.py scores it."""

import torch
import torch.nn.functional as F


@torch.no_grad()
def classify(model, tokenizer, prompts, choices):
    """(the answer to each prompt, the log-likelihoods of its choices (C,)), a list each.

    choices: texts, the same for every prompt, or a list of texts for each. Between prompt and choice stands
    one space, or the white space that the prompt ends with. A choice's log-likelihood is the sum over its
    tokens; of equals the first is the answer. The router's context is the prompt's, as in evaluate.py: a
    choice does not route itself. `model` is a unified model or any causal language model of transformers.
    """
    if choices and isinstance(choices[0], str):
        choices = [choices] * len(prompts)
    answers, scores = [], []
    for prompt, texts in zip(prompts, choices, strict=True):
        scores.append(log_likelihoods(model, tokenizer, prompt, texts))
        answers.append(texts[int(scores[-1].argmax())])
    return answers, scores


def log_likelihoods(model, tokenizer, prompt, texts):
    """log p(text | prompt) of each text, (C,) float64."""
    gap = "" if prompt[-1:].isspace() and prompt[-1] != " " else " "  # a space goes with the word behind it
    prompt = tokenizer(prompt.rstrip(" "))["input_ids"]
    if not prompt:
        raise ValueError("a prompt without a token: no choice can follow it; begin it with text")
    found = [tokenizer(gap + text.strip(), add_special_tokens=False)["input_ids"] for text in texts]
    longest, start = max(map(len, found)), len(prompt)
    ids = torch.tensor(
        [prompt + tokens + prompt[-1:] * (longest - len(tokens)) for tokens in found]
    )  # (C, T)
    ids = ids.to(model.get_input_embeddings().weight.device)
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    length = torch.tensor([[len(tokens)] for tokens in found], device=ids.device)  # (C, 1)
    prompt_alone = {"context_mask": place < start} if hasattr(model, "routing") else {}
    mask = (place < start + length).long()
    logits = model(ids, attention_mask=mask, use_cache=False, **prompt_alone).logits
    log_p = F.log_softmax(logits[:, start - 1 : -1].float(), -1).gather(2, ids[:, start:, None])[..., 0]
    own = place[:, : ids.shape[1] - start] < length  # (C, longest), less the padding
    return log_p.masked_fill(~own, 0).double().sum(1)
