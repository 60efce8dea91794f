"""A Hugging Face model with a loss of your own: the Hessian of its head, or of any layers.

python -m pip install transformers && python jobs/examples/hugging_face.py
"""

import torch
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

from pipeline import Problem, compute_hessian

torch.manual_seed(0)
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
model = BertForSequenceClassification(config).eval()  # from_pretrained(...) in its place; eval: no dropout

# What a tokenizer gives goes to the model as keywords, and whole to the loss in the place of the target. Flags may be
# among it.
batch = {
    "input_ids": torch.randint(1, 50, (20, 7)),
    "attention_mask": torch.ones(20, 7, dtype=torch.long),
    "labels": torch.randint(0, 2, (20,)),
    "return_dict": True,
}


def loss(output, given):
    """Cross-entropy with label smoothing; `output.loss` would be the model's own."""
    return cross_entropy(output.logits, given["labels"], label_smoothing=0.1)


problem = Problem(model, loss, batch, params=["classifier.*", "*layer.1.output.dense.*"])
H = compute_hessian(problem, executor="serial")
print(H, H.parameters.names)
