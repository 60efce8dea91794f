"""LoRA adapters by peft: the Hessian with respect to them alone, at their start or after training.

python -m pip install transformers peft && python jobs/examples/lora.py
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

from pipeline import Problem, compute_hessian

torch.manual_seed(0)
config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
adapted = LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.0)
model = get_peft_model(BertForSequenceClassification(config), adapted).eval()

batch = {
    "input_ids": torch.randint(1, 50, (20, 7)),
    "attention_mask": torch.ones(20, 7, dtype=torch.long),
    "labels": torch.randint(0, 2, (20,)),
}

# The adapters alone require grad: params= could be left out. B is zero at the start, so blocks of A with itself are.
problem = Problem(model, lambda output, _: output.loss, batch, params="*lora_*")
H = compute_hessian(problem, executor="serial")
for a in H.parameters.names:
    print(a.removeprefix("base_model.model.bert.encoder."), abs(H[a, a]).max())
