"""A word-level LSTM language model, trained with nothing attached and with each of three documents attached.

python examples/word_lm.py          about a minute and a half, on one core
python examples/word_lm.py --full   a larger model for longer, with three seeds: a quarter of an hour and more
python examples/word_lm.py --tiny   a few seconds, to see that it runs

The text is what `help()` says of Python's language, as it comes with Python. The first two sections are an ordinary
PyTorch program, with regkit in three marked lines; the third measures it. word_lm_report.py shows what was measured.

Sources: the tied embedding, Press & Wolf (2017); dropout around the LSTM, Zaremba et al. (2014); L2, as Keras' layers
take it; activity and temporal penalties, Merity et al. (2017); max-norm with dropout and a high learning rate,
Srivastava et al. (2014, §5.1).
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from time import process_time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from word_lm_report import Pace, Row, Run, draw, make_table, save

import regkit

SPECS = Path(__file__).parent / "specs"
WORD = re.compile(r"\w+|([^\w\s])\1*")  # a word, or a run of one punctuation mark
STREAMS, WINDOW = 20, 35  # the text is read in so many parallel streams, so many words at a time

State = tuple[Tensor, Tensor]

# --- the text --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """The text as word numbers.  train, valid: (time, streams)."""

    train: Tensor
    valid: Tensor
    vocabulary: int


def read_words() -> list[str]:
    """Every paragraph once: long topics repeat short ones whole, and a repeat must not be validated on."""
    paragraphs = chain.from_iterable(topics[topic].lower().split("\n\n") for topic in sorted(topics))
    tokens = (tuple(match.group() for match in WORD.finditer(paragraph)) for paragraph in paragraphs)
    return [word for paragraph in dict.fromkeys(tokens) for word in (*paragraph, "<end>")]


def read_corpus(limit: int | None, fewest: int) -> Corpus:
    """The first 7/8 of the text to train on, the rest to validate on; words that training saw too seldom are <unk>."""
    words = read_words()[:limit]
    cut = len(words) * 7 // 8
    counts = Counter(words[:cut])
    known = ["<unk>", *sorted(word for word, count in counts.items() if count >= fewest)]
    number = {word: index for index, word in enumerate(known)}
    train, valid = (streams([number.get(word, 0) for word in part]) for part in (words[:cut], words[cut:]))
    return Corpus(train, valid, len(known))


def streams(numbers: list[int]) -> Tensor:
    """The text cut into equal streams that lie side by side.  -> (time, streams)"""
    time = len(numbers) // STREAMS
    return torch.tensor(numbers[: time * STREAMS]).view(STREAMS, time).t().contiguous()


def windows(text: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and the words that follow them, window after window.  -> (time, streams) each"""
    for start in range(0, len(text) - 1, WINDOW):
        target = text[start + 1 : start + 1 + WINDOW]
        yield text[start : start + len(target)], target


# --- the model and its training --------------------------------------------------------------------------------------


class WordLM(nn.Module):
    """Embedding, LSTM, and a softmax over the vocabulary that shares the embedding's weights."""

    def __init__(self, vocabulary: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.rnn = nn.LSTM(hidden, hidden)
        self.decoder = nn.Linear(hidden, vocabulary)
        self.dropout = nn.Dropout(dropout)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.decoder.weight = self.embedding.weight

    def forward(self, words: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """The scores of each next word, and the state to go on from.  words: (time, streams)"""
        output, (h, c) = self.rnn(self.dropout(self.embedding(words)), state)
        return self.decoder(self.dropout(output)), (h.detach(), c.detach())


def one_epoch(
    model: WordLM, text: Tensor, optimizer: torch.optim.Optimizer, attachment: regkit.Attachment | None
) -> Iterator[None]:
    """Train on the text once, pausing after each step."""
    model.train()
    state: State | None = None
    for words, following in windows(text):
        logits, state = model(words, state)
        loss = cross_entropy(logits.flatten(0, 1), following.flatten())
        if attachment is not None:
            loss = loss + attachment.penalty()  # regkit
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        yield


def train(model: WordLM, corpus: Corpus, rate: float, spec: Path | None, epochs: int) -> Iterator[float]:
    """Train, giving the validation perplexity after each epoch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    attachment = regkit.attach(model, spec) if spec is not None else None  # regkit
    for _ in range(epochs):
        for _ in one_epoch(model, corpus.train, optimizer, attachment):
            pass
        yield perplexity(model, corpus.valid)
    if attachment is not None:
        attachment.detach()  # regkit


@torch.no_grad()
def perplexity(model: WordLM, text: Tensor) -> float:
    """exp of the mean cross-entropy, without dropout."""
    model.eval()
    state: State | None = None
    total = torch.zeros(())
    for words, following in windows(text):
        logits, state = model(words, state)
        total += cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum")
    return float((total / text[1:].numel()).exp())


# --- what is compared ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A loop, and the document attached to its model, if any. Dropout and learning rate are the loop's own affair."""

    loop: str
    dropout: float = 0.0
    speed: float = 1.0  # what the learning rate is multiplied by
    spec: Path | None = None

    @property
    def attached(self) -> str:
        """What is attached, as the report calls it."""
        return "nothing" if self.spec is None else self.spec.stem

    @property
    def bare(self) -> Setting:
        """What it is to be compared with: the same loop with nothing attached."""
        return replace(self, spec=None)


PLAIN, FAST = Setting("plain"), Setting("dropout, rate × 3", dropout=0.2, speed=3.0)
SETTINGS = (
    PLAIN,
    replace(PLAIN, spec=SPECS / "keras_l2.json"),
    replace(PLAIN, spec=SPECS / "ar_tar.json"),
    FAST,
    replace(FAST, spec=SPECS / "max_norm.json"),
)


@dataclass(frozen=True)
class Size:
    """How large the model is, and for how long it is trained and timed."""

    hidden: int = 80
    epochs: int = 4
    seeds: int = 2
    rate: float = 1e-2
    words: int | None = None  # all of them
    fewest: int = 6  # times that training must see a word for it to be in the vocabulary
    rounds: int = 15

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in asdict(self).items() if value is not None)


SIZES = {
    "default": Size(),
    "full": Size(hidden=128, epochs=15, seeds=3, rate=5e-3, fewest=4),
    "tiny": Size(hidden=16, epochs=1, words=6000, rounds=2),
}


def make_model(setting: Setting, corpus: Corpus, size: Size, seed: int) -> WordLM:
    """The same initial weights for every setting of a seed."""
    torch.manual_seed(seed)
    return WordLM(corpus.vocabulary, size.hidden, setting.dropout)


def train_seeds(setting: Setting, corpus: Corpus, size: Size, progress: Progress) -> list[Run]:
    """Train and measure a fresh model for each seed."""
    task = progress.add_task(f"{setting.loop}: {setting.attached}", total=size.epochs * size.seeds)
    runs: list[Run] = []
    for seed in range(size.seeds):
        model, valid = make_model(setting, corpus, size, seed), list[float]()
        for value in train(model, corpus, size.rate * setting.speed, setting.spec, size.epochs):
            valid.append(value)
            progress.advance(task)
        runs.append(Run(valid, perplexity(model, corpus.train), largest_row(model), mean_output(model, corpus.valid)))
    return runs


@torch.no_grad()
def largest_row(model: WordLM) -> float:
    """The largest norm of the incoming weights of one gate unit."""
    return max(float(w.norm(dim=1).max()) for w in model.rnn.parameters() if w.dim() == 2)


@torch.no_grad()
def mean_output(model: WordLM, text: Tensor) -> float:
    """The mean of |h| over the LSTM's outputs, without dropout."""
    output, _ = model.rnn(model.embedding(text))
    return float(output.abs().mean())


def time_steps(corpus: Corpus, size: Size, progress: Progress) -> dict[Setting, Pace]:
    """Blocks of steps of all settings in turn, so that a slow moment of the machine slows them all alike."""
    rounds: list[dict[Setting, float]] = []
    for number in progress.track(range(size.rounds), description="time per step"):
        turn = number % len(SETTINGS)  # none is always the first
        rounds.append({s: time_block(s, corpus, size) for s in (*SETTINGS[turn:], *SETTINGS[:turn])})
    return {setting: pace(setting, rounds) for setting in SETTINGS}


def pace(setting: Setting, rounds: Sequence[dict[Setting, float]]) -> Pace:
    """Medians over the rounds; the ratio is taken within each round."""
    seconds = median(one[setting] for one in rounds)
    return Pace(1000 * seconds, median(one[setting] / one[setting.bare] for one in rounds))


def time_block(setting: Setting, corpus: Corpus, size: Size, warm: int = 1, steps: int = 5) -> float:
    """The median CPU seconds of a step, which other programs on the machine do not count in.

    Nothing else is attached meanwhile: regkit's hooks see every optimizer's steps.
    """
    model = make_model(setting, corpus, size, seed=0)
    optimizer = torch.optim.Adam(model.parameters())
    attachment = regkit.attach(model, setting.spec) if setting.spec is not None else None
    ticks = [process_time() for _ in islice(one_epoch(model, corpus.train, optimizer, attachment), warm + steps)]
    if attachment is not None:
        attachment.detach()
    return median(after - before for before, after in zip(ticks[warm - 1 :], ticks[warm:], strict=False))


# --- the program -----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, Size]:
    """The options, and the size that they come to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = parser.add_mutually_exclusive_group()
    for name in ("full", "tiny"):
        sizes.add_argument(f"--{name}", dest="size", action="store_const", const=name, help=str(SIZES[name]))
    parser.set_defaults(size="default")
    for name in ("epochs", "seeds", "hidden"):
        parser.add_argument(f"--{name}", type=int, metavar="N", help="instead of the size's own")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch; default: %(default)s")
    parser.add_argument("--picture", type=Path, default=Path("word_lm.png"), help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="save the numbers, too")
    parser.add_argument("--plan", action="store_true", help="print what each document binds to, and stop")
    options = parser.parse_args(arguments)
    given = {key: getattr(options, key) for key in ("epochs", "seeds", "hidden")}
    return options, replace(SIZES[options.size], **{key: value for key, value in given.items() if value is not None})


def print_plans(corpus: Corpus, size: Size) -> None:
    """What each document would do to the model."""
    for setting in SETTINGS:
        if setting.spec is not None:
            print(f"\n{setting.spec.name}\n{regkit.resolve(make_model(setting, corpus, size, seed=0), setting.spec)}")


def run(corpus: Corpus, size: Size, console: Console) -> list[Row]:
    """Train and time every setting."""
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*bars, console=console) as progress:
        runs = {setting: train_seeds(setting, corpus, size, progress) for setting in SETTINGS}
        paces = time_steps(corpus, size, progress)
    return [Row(s.loop, s.attached, runs[s], paces[s]) for s in SETTINGS]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and show what came out."""
    options, size = parse(arguments)
    torch.set_num_threads(options.threads)
    corpus = read_corpus(size.words, size.fewest)
    if options.plan:
        print_plans(corpus, size)
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"{corpus.train.numel()} words to train on, {corpus.valid.numel()} to validate on,", end=" ")
    console.print(f"{corpus.vocabulary} different; {size}")
    rows = run(corpus, size, console)
    console.print(make_table(rows))
    draw(rows, options.picture)
    console.print(f"curves: {options.picture}")
    if options.json is not None:
        save(rows, asdict(size), options.json)


if __name__ == "__main__":
    main()
