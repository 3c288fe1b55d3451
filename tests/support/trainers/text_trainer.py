"""A small text model in Hugging Face's manner, what trains it in their Trainer, and the same loops by hand."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

gc.freeze()  # the Trainer collects garbage as it begins: looking through all of torch takes longer than training here
WORDS, LENGTH = 7, 6
DECAY = 0.1
Loss = Callable[[nn.Module, dict[str, Tensor], list[dict[str, Tensor]]], Tensor]
After = Callable[[Any, float], None]


class TextModel(nn.Module):
    """Predicts the next word: a frozen embedding, and an LSTM with a unit for each word, whose output is the logits.

    So every weight that is trained is a recurrent layer's, and a weight decay of the Trainer's reaches the same ones.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 4).requires_grad_(False)
        self.dropout = nn.Dropout(dropout)
        self.rnn = nn.LSTM(4, WORDS, batch_first=True)

    def logits(self, input_ids: Tensor) -> Tensor:
        """input_ids: (batch, time) -> (batch, time, words)."""
        return self.rnn(self.dropout(self.embedding(input_ids)))[0]

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> CausalLMOutput:
        logits = self.logits(input_ids)
        loss = None if labels is None else nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class CountingModel(TextModel):
    """The same, as the models in Transformers are: it takes `num_items_in_batch` and divides by it."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        logits = self.logits(input_ids)
        loss = None if labels is None else summed(logits, labels) / kwargs.get("num_items_in_batch", items([labels]))
        return CausalLMOutput(loss=loss, logits=logits)


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross entropy of all words that are not padding, in sum."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def items(labels: list[Tensor]) -> int:
    return sum(int(one.ne(-100).sum()) for one in labels)


def make_text_model(kind: type[TextModel] = TextModel, **options: Any) -> TextModel:
    """Equal models in float64: the same weights at every call."""
    torch.manual_seed(1)
    return kind(**options).double()


def texts(count: int = 7) -> list[dict[str, Tensor]]:
    """Sentences that are padded in their labels, each to a length of its own."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for index in range(count):
        words = torch.randint(WORDS, (LENGTH + 1,), generator=generator)
        labels = words[1:].clone()
        labels[LENGTH - index % 4 :] = -100
        found.append({"input_ids": words[:-1], "labels": labels})
    return found


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Two epochs of 4 batches each, the last of one sentence; accumulated by 3 they are steps of 3 and 1 batches."""
    given = {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "train_sampling_strategy": "sequential",
        "learning_rate": 0.05,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.05,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(output_dir=str(folder), **{**given, **options})


def trained(model: nn.Module, folder: Path, trainer: type[Trainer] = Trainer, **options: Any) -> Trainer:
    """A Trainer that has trained the model; what is no argument of its own goes to TrainingArguments."""
    own = (
        "spec",
        "detach",
        "callbacks",
        "optimizers",
        "compute_loss_func",
        "data_collator",
        "eval_dataset",
        "model_init",
    )
    mine = {key: options.pop(key) for key in own if key in options}
    checkpoint = options.pop("resume_from_checkpoint", None)
    found = trainer(model=model, args=arguments(folder, **options), train_dataset=texts(), **mine)
    found.train(resume_from_checkpoint=checkpoint)
    return found


def windows(accumulation: int) -> Iterator[list[dict[str, Tensor]]]:
    """The batches of each optimizer step in an epoch, as the Trainer puts them together."""
    data = texts()
    pairs = [data[i : i + 2] for i in range(0, len(data), 2)]
    batches = [{key: torch.stack([one[key] for one in pair]) for key in pair[0]} for pair in pairs]
    yield from (batches[i : i + accumulation] for i in range(0, len(batches), accumulation))


def train_by_hand(model: nn.Module, loss_of: Loss, accumulation: int = 1, after: After | None = None) -> None:
    """The same run without any library: AdamW, clipping, and a learning rate that falls in a straight line.

    after: what is done to the weights after each step, given the learning rate of it.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    steps = 2 * len(list(windows(accumulation)))
    for step, window in enumerate([*windows(accumulation), *windows(accumulation)]):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / steps)
        optimizer.zero_grad()
        for batch in window:
            loss_of(model, batch, window).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        if after is not None:
            with torch.no_grad():
                after(model, optimizer.param_groups[0]["lr"])
