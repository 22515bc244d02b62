"""How a language model scores records: by likelihood, by the choices' letters, or by what it generates."""

import re

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from metamoe.backbones.base import unwrap
from metamoe.backbones.letters import lettered
from metamoe.progress import progress


class ScoringMixin:
    """The scores of TextBackbone."""

    @torch.no_grad()
    def scores(self, model, records, label="scoring", scoring="likelihood"):
        """A list of float64 arrays, one per record.

        likelihood: log-likelihood of each choice's text after the prompt.
        letters: logit of each choice's letter after the lettered prompt, from one forward pass.
        generate: 1 for the choice whose letter stands first in 16 greedily generated tokens, 0 for the
        others; empty where there is no such letter.
        Records without choices: the log-probability of each token of the answer.
        """
        score, encoded = self._scored_form(records, scoring)
        result = [None] * len(records)
        with progress(total=len(records), desc=label, unit="text") as bar:
            for batch in self.batches([len(prompt) + sum(map(len, choices)) for prompt, choices in encoded]):
                for i, values in zip(batch, score(model, [encoded[i] for i in batch]), strict=True):
                    result[i] = values
                bar.update(len(batch))
        return result

    def _scored_form(self, records, scoring):
        """The function that scores these records, and their (prompt ids, [ids of each choice])."""
        if "choices" not in records[0]:
            pairs = [self.encode(record, record["answer"]) for record in records]
            return self._score_answers, [(prompt, [answer]) for prompt, answer in pairs]
        if scoring == "likelihood":
            choices = [[self.encode(record, c)[1] for c in record["choices"]] for record in records]
            prompts = [self.encode(record)[0] for record in records]
            return self._score_choices, list(zip(prompts, choices, strict=True))
        score = self._score_letters if scoring == "letters" else self._generate
        return score, [(self.encode(lettered(r), " A")[0], [[]] * len(r["choices"])) for r in records]

    def _score_choices(self, model, encoded):
        # The router's context is the prompt for every choice's tokens, even in a model whose router otherwise
        # takes the prefix: a choice must not route itself.
        found = self._token_log_probs(model, encoded, whole=False)
        return [np.array([np.cumsum([0.0, *tokens])[-1] for tokens in choices]) for choices in found]

    def _score_answers(self, model, encoded):
        # the context as in training
        return [tokens for (tokens,) in self._token_log_probs(model, encoded, self.whole_text)]

    def _score_letters(self, model, encoded):
        shared, letters = self.letter_ids()
        ids, real, prompts, _ = self.collate([(prompt, shared) for prompt, _ in encoded])
        with self.autocast():
            states = self.hidden(model, ids, real, real if self.whole_text else prompts)  # (B, T, d)
        last = states[range(len(encoded)), real.sum(1) - 1]  # (B, d)
        # In float32: bfloat16 would tie likely letters.
        head = unwrap(model).lm_head
        bias = 0 if head.bias is None else head.bias[letters].float()
        logits = self.after_head(last.float() @ head.weight[letters].float().T + bias)  # (B, 26)
        rows = logits.double().cpu().numpy()
        return [row[: len(choices)] for row, (_, choices) in zip(rows, encoded, strict=True)]

    def _generate(self, model, encoded):
        from transformers import GenerationConfig

        lm = unwrap(model)
        width = max(len(prompt) for prompt, _ in encoded)
        padded = [[self.pad] * (width - len(prompt)) + prompt for prompt, _ in encoded]  # on the left
        real = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in encoded]
        ids, real = torch.tensor([padded, real], device=self.device)  # (B, width)
        # Not the seed model's own configuration, which may sample or punish repetition.
        config = GenerationConfig(max_new_tokens=16, do_sample=False, use_cache=lm.config.use_cache)
        config.pad_token_id, config.eos_token_id = self.pad, self.tokenizer.eos_token_id
        if hasattr(lm, "routing"):
            lm.routing.context_mask = lm.routing.token_mask = None
        with self.autocast():
            out = lm.generate(input_ids=ids, attention_mask=real, generation_config=config)
        texts, values = self.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True), []
        for text, (_, choices) in zip(texts, encoded, strict=True):
            found = re.search(r"\b[A-Z]\b", text)
            number = ord(found.group()) - ord("A") if found else len(choices)
            values.append(np.eye(len(choices))[number] if number < len(choices) else np.array([]))
        return values

    def _token_log_probs(self, model, encoded, whole):
        """Log-probability of each token of each choice: [[array a choice] a record].

        Prompt and choices make one sequence. A choice sees the prompt and itself, and its positions follow
        the prompt's. So the prompt is computed once, and the result is that of one sequence for every choice.
        whole: whether the router's context is the mean of all tokens, not of the prompt's.
        """
        window = getattr(unwrap(model).config.get_text_config(), "sliding_window", None)
        longest = max(len(prompt) + sum(map(len, choices)) for prompt, choices in encoded)
        if window and longest > window and any(len(choices) > 1 for _, choices in encoded):
            # a mask of our own would open the window: each choice in a sequence of its own
            alone = [(prompt, [choice]) for prompt, choices in encoded for choice in choices]
            found = iter(self._token_log_probs(model, alone, whole))
            return [[next(found)[0] for _ in choices] for _, choices in encoded]
        ids, part, position = (t.to(self.device) for t in pack(encoded, self.pad))
        prompt = part == 0
        rows, columns = (part > 0).nonzero(as_tuple=True)  # of the tokens to score
        # A token is predicted at the one before it; a choice's first token at the prompt's last.
        first = part[rows, columns - 1] != part[rows, columns]
        before = torch.where(first, prompt.sum(1)[rows] - 1, columns - 1)
        branches = any(len(choices) > 1 for _, choices in encoded)
        mask = tree_mask(part, self.dtype) if branches else part >= 0
        extra = {"attention_mask": mask, "position_ids": position}
        with self.autocast():
            # Only the prompt's tokens count as routed: wrong choices say nothing about a client's tokens.
            states = self.hidden(model, ids, prompt, part >= 0 if whole else prompt, **extra)
            logits = self.after_head(unwrap(model).lm_head(states[rows, before]))  # (scored tokens, V)
        log_probs = F.log_softmax(logits.float(), -1).gather(1, ids[rows, columns][:, None])[:, 0]
        lengths = [len(tokens) for _, choices in encoded for tokens in choices]
        values = iter(log_probs.double().cpu().split(lengths))  # one choice after another
        return [[next(values).numpy() for _ in choices] for _, choices in encoded]


def pack(encoded, pad):
    """Prompt and choices of each record as one padded sequence: ids, part, position; each (B, T).

    part: 0 for the prompt, 1, 2, ... for that choice, -1 for padding.
    """
    rows = []
    for prompt, choices in encoded:
        ids, part, position = [*prompt], [0] * len(prompt), [*range(len(prompt))]
        for number, tokens in enumerate(choices, 1):
            ids += tokens
            part += [number] * len(tokens)
            position += range(len(prompt), len(prompt) + len(tokens))
        rows.append([torch.tensor(each, dtype=torch.int64) for each in (ids, part, position)])
    columns = zip(zip(*rows, strict=True), (pad, -1, 0), strict=True)
    return [pad_sequence(column, batch_first=True, padding_value=fill) for column, fill in columns]


def tree_mask(part, dtype):
    """Additive attention mask (B, 1, T, T): a token sees the prompt and its own choice, up to itself."""
    sees = (part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None])  # (B, T, T)
    mask = torch.zeros(sees.shape, dtype=dtype, device=part.device)
    return mask.masked_fill(~sees.tril(), torch.finfo(dtype).min)[:, None]
