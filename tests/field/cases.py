"""Problems in other libraries' words, each with its loss over all data in plain torch, for the oracle."""

import torch
import torch.nn.functional as F
from torch import nn
from zoo import Case

from pipeline import Problem


def tokens(n=6, length=5, vocabulary=30):
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(1, vocabulary, (n, length), generator=g)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.randint(0, 2, (n,), generator=g),
    }


def bert_model():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForSequenceClassification(BertConfig(vocab_size=30, max_position_embeddings=8, **sizes)).eval()


def bert():
    model, batch = bert_model(), tokens()
    problem = Problem(model, lambda out, _: out.loss, batch, params=["classifier.*", "bert.encoder.layer.0.output.*"])
    return Case(problem, lambda m, b: m(**b).loss, batch)


def encoding():
    """What a tokenizer gives, as it is."""
    from transformers import BatchEncoding

    model, batch = bert_model(), tokens()
    loss = lambda out, b: F.cross_entropy(out.logits, b["labels"], label_smoothing=0.1)
    problem = Problem(model, loss, BatchEncoding({**batch, "return_dict": True}), params=["classifier.*"])
    return Case(problem, lambda m, b: loss(m(**b), b), batch)


def lora():
    from peft import LoraConfig, get_peft_model

    adapted = LoraConfig(r=2, target_modules=["query", "value"], lora_dropout=0.0)
    torch.manual_seed(0)
    model, batch = get_peft_model(bert_model(), adapted).eval(), tokens()
    return Case(Problem(model, lambda out, _: out.loss, batch, params="*lora_*"), lambda m, b: m(**b).loss, batch)


def next_tokens(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def causal(model, params):
    batch = {"input_ids": tokens(4, 6, 20)["input_ids"], "use_cache": False}
    problem = Problem(model, lambda out, b: next_tokens(out.logits, b["input_ids"]), batch, params=params)
    return Case(problem, lambda m, b: next_tokens(m(**b).logits, b["input_ids"]), batch)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2)
    return causal(GPT2LMHeadModel(config).eval(), ["*ln_*", "*c_proj*"])


def llama():
    """Rotary embeddings and root mean squares that are written in float32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    return causal(LlamaForCausalLM(config).eval(), ["*norm*", "*q_proj*"])


def graph():
    from torch_geometric.data import Data
    from torch_geometric.nn import GCNConv

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = GCNConv(4, 5), GCNConv(5, 3)

        def forward(self, data):
            return self.second(torch.tanh(self.first(data.x, data.edge_index)), data.edge_index)

    torch.manual_seed(0)
    data = Data(x=torch.randn(7, 4), edge_index=torch.randint(0, 7, (2, 14)), y=torch.randint(0, 3, (7,)))
    data.known = torch.tensor([1, 1, 0, 1, 0, 1, 1], dtype=torch.bool)
    loss = lambda out, d: F.cross_entropy(out[d.known], d.y[d.known])
    return Case(Problem(Net(), loss, data, separable=False), lambda m, d: loss(m(d), d), data)


def graphs():
    """Batches of graphs, which are cut at graphs."""
    from torch_geometric.data import Batch, Data
    from torch_geometric.loader import DataLoader
    from torch_geometric.nn import GINConv, global_mean_pool

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = GINConv(nn.Sequential(nn.Linear(4, 5), nn.Tanh())), nn.Linear(5, 2)

        def forward(self, data):
            return self.head(global_mean_pool(self.first(data.x, data.edge_index), data.batch))

    torch.manual_seed(0)
    made = [
        Data(x=torch.randn(n, 4), edge_index=torch.randint(0, n, (2, 2 * n)), y=torch.tensor([n % 2]))
        for n in (3, 4, 5, 6, 4)
    ]
    loss = lambda out, d: F.cross_entropy(out, d.y)
    problem = Problem(Net(), loss, DataLoader(made, batch_size=3))
    return Case(problem, lambda m, d: loss(m(d), d), Batch.from_data_list(made))


def flow():
    """Parameters that are read when the distribution is asked, after the forward pass."""
    import zuko

    torch.manual_seed(0)
    model, x = zuko.flows.NSF(2, transforms=1, hidden_features=[4], bins=3), torch.randn(7, 2)
    function = lambda call, b: (-call().log_prob(b[0]).sum(), len(b[0]))
    return Case(Problem(model, objective=function, data=(x,)), lambda m, b: -m().log_prob(b[0]).mean(), (x,))


def solver():
    from torchdiffeq import odeint

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.field = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))

        def forward(self, x):
            times = torch.linspace(0, 1, 5).to(x)
            return odeint(lambda _, y: self.field(y), x, times, method="rk4")[-1]

    torch.manual_seed(0)
    x, y = torch.randn(6, 2), torch.randn(6, 2)
    return Case(Problem(Net(), nn.MSELoss(), (x, y)), lambda m, b: F.mse_loss(m(b[0]), b[1]), (x, y))


CASES = {
    "transformers": [bert, encoding, gpt2, llama],
    "peft": [lora],
    "torch_geometric": [graph, graphs],
    "zuko": [flow],
    "torchdiffeq": [solver],
}
