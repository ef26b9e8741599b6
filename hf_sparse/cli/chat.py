"""Hold a conversation with an adapter: `hf-sparse chat`."""

import sys
from typing import Annotated, Any

import typer

from hf_sparse.cli.answering import ANSWERING, Answerer
from hf_sparse.cli.common import Folder
from hf_sparse.cli.errors import complain
from hf_sparse.cli.options import with_options

_END = ("/exit", "/quit")


@with_options(answering=ANSWERING)
def chat(
    folder: Folder,
    answering: dict[str, Any],
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="What the model is told before all else.")] = None,
) -> None:
    """Hold a conversation with the adapter in DIR.

    Each line is a message; /new starts anew, /exit or the end of the input ends it.
    """
    answerer = Answerer(folder, answering)
    if answerer.tokenizer.chat_template is None:
        if system is not None:
            raise ValueError("--system needs a chat template, and the tokenizer of the base model has none")
        complain("the tokenizer has no chat template: the model continues what you type, and does not answer")
    conversation = _Conversation(answerer, system)
    while (line := _read_line()) is not None:
        if line in _END:
            break
        if line == "/new":
            conversation = _Conversation(answerer, system)
        elif line:
            complain(conversation.say(line))


class _Conversation:
    """Hold the messages of a conversation, or, without a chat template, the tokens of one text."""

    def __init__(self, answerer: Answerer, system: str | None) -> None:
        self.answerer, self.ids = answerer, list[int]()
        self.messages = [] if system is None else [{"role": "system", "content": system}]

    def say(self, line: str) -> str:
        """Print the answer to a line; returns what it took."""
        tokenizer = self.answerer.tokenizer
        if tokenizer.chat_template is None:
            from hf_sparse.data import prompt_tokens

            ids = self.ids + tokenizer(line, add_special_tokens=False)["input_ids"] if self.ids else None
            answer = self.answerer.answer(ids or prompt_tokens(tokenizer, line))
            self.ids = answer.ids
            return answer.summary()
        self.messages.append({"role": "user", "content": line})
        text = tokenizer.apply_chat_template(self.messages, add_generation_prompt=True, tokenize=False)
        answer = self.answerer.answer(tokenizer(text, add_special_tokens=False)["input_ids"])
        self.messages.append({"role": "assistant", "content": answer.text})
        return answer.summary()


def _read_line() -> str | None:
    """Return the next line of stdin without blanks around it, `None` at its end; a person sees a prompt."""
    if sys.stdin.isatty():
        try:
            return input("> ").strip()
        except EOFError:
            return None
    line = sys.stdin.readline()
    return line.strip() if line else None
