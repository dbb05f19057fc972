"""`rwkv chat`: a conversation on a terminal or through pipes."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from rwkv_jax.chat.template import Thinking, begins_thinking, check_start
from rwkv_jax.checks import ConfigError, checker
from rwkv_jax.cli.flags import SamplingFlags, TunedFlags, WeightsFlags, require_text
from rwkv_jax.cli.speed import Speed

if TYPE_CHECKING:
    from rwkv_jax.inference.chat.dialogue import Dialogue

FIRST_BRANCH = "main"
"""Name of the first conversation."""

HELP = """\
/fork NAME     keep a copy of the conversation as it stands under a name, and stay here
/switch NAME   continue the conversation of a name; the one you leave keeps its own
/save FILE     write the state to a file, for any machine with the same model
/load FILE     continue from a saved state
/retry         take the last reply back and have another one
/undo          take the last turn back
/thoughts      what the model thought before its last answer
/reset         start over
/help          this
/quit          end, as the end of input does
A line that ends with a backslash continues in the next one.
Ctrl-C ends a reply; the conversation continues from what was shown. Twice in a row, it ends the program."""

_WITH_NAME = ("/fork", "/switch", "/save", "/load")
_ALONE = ("/retry", "/undo", "/thoughts", "/reset", "/help", "/quit")


@dataclasses.dataclass(frozen=True)
class Chat:
    """Chat with a model. The state holds the history, so each turn prefills only its new text."""

    weights: Annotated[WeightsFlags, tyro.conf.arg(name="")]
    tuned: Annotated[TunedFlags, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TunedFlags)
    template: str | None = None
    """Chat template the model was trained with: g1 for RWKV-7 G1 models, which may think, world (User and Assistant as
    well) for World models, raven (Bob and Alice) for RWKV-4 Raven, pile-qa for base models trained on the Pile, or a
    file of a Jinja template; None takes the one beside the weights, or chooses by their name and tokenizer."""
    system: str | None = None
    """System message."""
    thinking: Thinking = "none"
    """Thinking of G1 models. none: not requested. open: the model thinks first, as long as it chooses; think, think a
    bit, think a lot: for the time that this asks for (models from September 2025 on). closed, empty: it answers at
    once, after an empty think block on two lines or on one; use the one that gives better answers. /thoughts shows the
    thinking."""
    tokens: int = 2048
    """Maximum tokens of a reply."""
    sampling: Annotated[SamplingFlags, tyro.conf.arg(name="")] = dataclasses.field(
        default_factory=lambda: SamplingFlags(preset="rwkv")
    )
    seed: int = 0
    """Seed of the first reply; each further reply increments it."""
    tune: Literal["auto", "never"] = "auto"
    """auto takes what is fastest by measurement on this device, measured now if need be; never, the tables' choices."""
    verbose: bool = False
    """Report the speed of each reply on standard error, as on a terminal."""

    def run(self) -> None:
        """Answers lines of standard input until it ends."""
        check = checker(self)
        check(self.tokens >= 1, "tokens", "must be at least 1")
        check(0 <= self.seed < 2**32, "seed", "must fit in 32 bits and not be negative")
        if self.system is not None:
            require_text(f"system = {self.system!r}", self.system)
        sampling = self.sampling.sampling()

        from rwkv_jax.chat.choice import named_template

        check_start(named_template(self.template or "g1"), self.system, self.thinking)

        from rwkv_jax.inference.chat.dialogue import Dialogue
        from rwkv_jax.inference.engine.engine import Engine, EngineOptions

        options = EngineOptions(num_slots=1, prefix_bytes=0, tune=self.tune)
        tuned = self.tuned.arguments(self.weights)
        model, tokenizer, template = self.weights.load_with_template(self.template, self.tuned)
        engine = Engine(model, tokenizer, options, **tuned)
        del model  # the engine has copied each layer; the stacked arrays can be freed
        tells = self.verbose or sys.stderr.isatty()
        chat = ChatLoop(
            Dialogue(engine, template, self.system, self.thinking),
            {"max_tokens": self.tokens, "sampling": sampling},
            self.seed,
            tell_speed=(lambda speed: _tell(f"[{speed}]")) if tells else None,
            tell_thinking=(lambda: _tell("[thinking ...]")) if tells and begins_thinking(self.thinking) else None,
        )
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):  # line editing and history, where available
                import readline

                # Pasted text is one message, even with line breaks; libedit, used on macOS, ignores this.
                readline.parse_and_bind("set enable-bracketed-paste on")
            print("Type /help for the commands.")
        converse(chat)


class ChatLoop:
    """Answers input lines: messages, and commands that start with a slash."""

    def __init__(
        self,
        dialogue: Dialogue,
        arguments: dict[str, Any],
        seed: int = 0,
        *,
        tell_speed: Callable[[Speed], None] | None = None,
        tell_thinking: Callable[[], None] | None = None,
    ) -> None:
        """At the start of a conversation.

        Args:
          arguments: for every reply, as in `Engine.stream`: max_tokens, sampling.
          seed: of the first reply; each further reply increments it.
          tell_speed: called after each reply.
          tell_thinking: called if a reply starts with tokens that are not shown.
        """
        self._dialogues, self._branch = {FIRST_BRANCH: dialogue}, FIRST_BRANCH
        self._arguments, self._next_seed = arguments, seed
        self._tell_speed, self._tell_thinking = tell_speed, tell_thinking
        self.is_over = False
        """Whether /quit was given."""

    @property
    def dialogue(self) -> Dialogue:
        """The current conversation."""
        return self._dialogues[self._branch]

    def answer(self, line: str) -> Generator[str]:
        """Yields the answer to a line in pieces, the last with a line break; closing the generator ends the reply.

        Invalid values and logits that are not finite are reported and change nothing.
        """
        try:
            if line.startswith("/"):
                yield from self._command(line)
            elif line.strip():
                yield from self._reply(line)
        except (ConfigError, FloatingPointError) as error:
            yield f"! {error}\n"

    def _reply(self, message: str) -> Iterator[str]:
        require_text(f"message {message!r}", message)
        seed, self._next_seed = self._next_seed, (self._next_seed + 1) % 2**32
        speed, is_in_line, is_first = Speed(), False, True
        pieces = self.dialogue.reply(message, seed=seed, **self._arguments)
        with contextlib.closing(pieces):
            try:
                for piece in pieces:
                    speed.count(1)
                    if is_first and not piece and self._tell_thinking is not None:
                        self._tell_thinking()
                    is_first = False
                    is_in_line |= bool(piece)
                    yield piece
            except FloatingPointError:
                if is_in_line:  # the error starts on a new line
                    yield "\n"
                raise
        yield "\n"
        if self._tell_speed is not None:
            self._tell_speed(speed)

    def _command(self, line: str) -> Iterator[str]:
        name, _, argument = line.strip().partition(" ")
        argument = argument.strip()
        if name not in (*_WITH_NAME, *_ALONE):
            raise ConfigError(f"{name}: there is no such command; /help lists them")
        if name in _WITH_NAME and not argument:
            raise ConfigError(f"{name}: needs a name behind it; /help lists the commands")
        if name in _ALONE and argument:
            raise ConfigError(f"{name}: takes nothing behind it, not {argument!r}")
        match name:
            case "/fork":
                if argument in self._dialogues:
                    raise ConfigError(f"/fork {argument}: there is a conversation of that name; take another")
                self._dialogues[argument] = self.dialogue.fork()
                yield f"{argument} is a copy of this conversation; you are still in {self._branch}\n"
            case "/switch":
                if argument not in self._dialogues:
                    names = ", ".join(self._dialogues)
                    raise ConfigError(f"/switch {argument}: there is none of that name; there are {names}")
                self._branch = argument
                yield f"in {argument}, {self.dialogue.num_tokens} tokens long\n"
            case "/save":
                self.dialogue.save(argument)
                yield f"saved to {argument}\n"
            case "/load":
                self.dialogue.load(argument)
                yield f"loaded {argument}, {self.dialogue.num_tokens} tokens long\n"
            case "/retry":
                yield from self._retry()
            case "/undo":
                yield f"taken back: {self.dialogue.undo()}\n"
            case "/thoughts":
                yield f"{self.dialogue.thoughts or 'none'}\n"
            case "/reset":
                self.dialogue.reset()
                yield "a new conversation\n"
            case "/help":
                yield f"{HELP}\n"
            case "/quit":
                self.is_over = True

    def _retry(self) -> Iterator[str]:
        before = self.dialogue
        undone = before.fork()
        message = undone.undo()
        self._dialogues[self._branch] = undone
        try:
            yield from self._reply(message)
        except Exception:  # no new reply: keep the old one
            self._dialogues[self._branch] = before
            raise


def converse(chat: ChatLoop) -> None:
    """Reads standard input and writes standard output until one of them ends, or a second Ctrl-C in a row."""
    interrupted = False
    while not chat.is_over:
        try:
            line = _read_message()
        except KeyboardInterrupt:
            print()
            if interrupted:
                raise
            interrupted = True
            print("Ctrl-C again, or /quit, ends the chat.")
            continue
        interrupted = False
        if line is None:
            if sys.stdin.isatty():
                print()  # for the prompt of the shell
            return
        with _interrupts() as is_interrupted, contextlib.closing(chat.answer(line)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
                if is_interrupted():
                    print()
                    break


def _read_message() -> str | None:
    """The next line, joined with its continuations after backslashes; None at the end of input."""
    lines: list[str] = []
    while (line := _read_line("... " if lines else "> ")) is not None:
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            break
    return "\n".join(lines) if lines else None


def _read_line(prompt: str) -> str | None:
    """The next line; None at the end of input."""
    try:
        if sys.stdin.isatty():
            return input(prompt)
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input: is not UTF-8 ({error}); convert it") from error


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether Ctrl-C was pressed; a second Ctrl-C raises KeyboardInterrupt."""
    pressed = False

    def press(signum: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)
