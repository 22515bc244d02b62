"""Records as token ids: prompts, chats, answers, letters; what the embedding and max_length leave of them."""

import contextlib
import os

from metamoe.backbones.distributed import processes
from metamoe.backbones.letters import LETTERS
from metamoe.errors import UserError


class TokensMixin:
    """The token ids of TextBackbone."""

    def take_vocabulary(self, model):
        """What the embedding of the model has of the tokenizer's special tokens.

        end: the ids that end an answer, none where the tokenizer has no EOS. pad: any id will do, it is
        masked everywhere.
        """
        self.rows = model.get_input_embeddings().weight.shape[0]
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        self.end = [] if end is None else self.known([end])
        self.pad = next(token for token in (pad, end, 0) if token is not None and token < self.rows)
        if self.end and self.tokenizer("a")["input_ids"][-1:] == self.end:
            problem = "its tokenizer ends every prompt with EOS, where an answer is to follow"
            remedy = "save it with add_eos_token false"
            raise UserError(f"seed model {self.source}: {problem}: {remedy}")

    def known(self, ids):
        """The ids. UserError where one of them has no row in the embedding."""
        if ids and max(ids) >= self.rows:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            problem = f"its tokenizer makes {token!r} token {max(ids)}, its embedding has {self.rows} rows"
            remedy = "save it again after model.resize_token_embeddings(len(tokenizer))"
            raise UserError(f"seed model {self.source}: {problem}: {remedy}")
        return ids

    def tokens(self, text, special=False):
        """The ids of a text, with the tokenizer's own beginning and end where `special`."""
        return self.known(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def encode(self, record, answer=None):
        """(prompt ids, answer ids), together at most max_length - 1 tokens; the last place is for EOS.

        A prompt that is too long keeps its end, and its BOS, which language models rely on. An answer that is
        too long keeps its beginning.
        """
        prompt, ids, room = self.prompt_ids(record), [], 0
        if answer is not None:
            if self.chats(record):
                answer = answer.lstrip()  # the template ends where the answer begins
            room = self.max_length // 2
            if self.whole_text:  # an answer may have all that a short prompt leaves
                room = max(room, self.max_length - 1 - len(prompt))
            ids = self.tokens(answer)
        if len(prompt) + len(ids) + 1 > self.max_length:
            self.cut, self.longest = self.cut + 1, max(self.longest, len(prompt) + len(ids) + 1)
        ids = ids[:room]
        room = self.max_length - len(ids) - 1
        if len(prompt) > room:
            begin = prompt[:1] if prompt[:1] == [self.tokenizer.bos_token_id] else []
            prompt = begin + prompt[len(prompt) - room + len(begin) :]
        return prompt, ids

    @contextlib.contextmanager
    def telling_cuts(self, label, count):
        """Say how many of the `count` texts that are encoded inside do not fit in max_length."""
        self.cut = self.longest = 0
        yield
        if self.cut and processes().is_main_process:
            cut = f"{self.cut} of {count} texts cut to {self.max_length} tokens"
            print(f"{label}: {cut}, the longest has {self.longest} (--max-length)", flush=True)

    def chats(self, record):
        """Whether the record's messages go through the tokenizer's chat template."""
        return self.chat_template and "messages" in record and bool(self.tokenizer.chat_template)

    def prompt_ids(self, record):
        if not self.chats(record):
            return self.tokens(record["prompt"], special=True)
        try:
            text = self.tokenizer.apply_chat_template(
                record["messages"], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template raises what it likes
            why = f"the chat template of {self.source} refuses a record: {error}"
            raise UserError(f"{why} (its prompt: {record['prompt'][:60]!r}): --chat-template off") from None
        return self.tokens(text)  # the template writes its own

    def letter_ids(self):
        """(ids that the answers " A", " B", ... all begin with; the 26 ids that differ).

        In many vocabularies " A" is one token, and the first list is empty; in others it is two tokens.
        """
        letters = [self.tokens(letter) for letter in LETTERS]
        shared = os.path.commonprefix(letters)
        ids = [letter[len(shared)] for letter in letters if len(letter) > len(shared)]
        if len(set(ids)) < len(letters):
            problem = "its tokenizer does not tell the letters A to Z apart"
            raise UserError(f"seed model {self.source}: {problem}: score with --scoring likelihood")
        return shared, ids
