"""transformers: the Trainer over Replicas of GPT-2 (language modelling) and of BERT (classification).

The replicas' output has the sum of the copies' losses as its `loss`, and a tuple of the copies' logits as its `logits`. The
Trainer asks the model's class what it takes, and for Replicas it has to be told.
"""

import copy

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

import hta_fused as hta

SMALL = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def gpt2(dropout=0.0):
    rates = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    # The keys and values of earlier tokens are no tensors that evaluation could gather.
    config = GPT2Config(**SMALL, **rates, n_embd=32, n_layer=2, n_head=2, n_positions=16, use_cache=False)
    return GPT2LMHeadModel(config)


def bert(dropout=0.0):
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForSequenceClassification(
        BertConfig(**SMALL, **rates, **sizes, max_position_embeddings=16, num_labels=2)
    )


def data(kind):
    tokens = (torch.randint(1, 64, (64, 1)) + torch.arange(16)) % 64  # counting
    labels = tokens if kind is gpt2 else (tokens[:, 0] > 32).long()
    return [{"input_ids": t, "labels": label} for t, label in zip(tokens, labels, strict=True)]


class TiedTrainer(Trainer):  # glue
    """GPT-2's output layer is its embedding, and of modules not its own the Trainer saves a state_dict as it is, where
    safetensors refuses two names for one memory."""

    def _save(self, output_dir=None, state_dict=None):  # glue
        super()._save(output_dir, {name: value.clone() for name, value in self.model.state_dict().items()})  # glue


def trainer(net, dataset, folder, kind=Trainer, **options):
    replicas = hta.Replicas(net)  # glue
    optimizer = hta.CoupledOptimizer(replicas, hta.AdamW(lr=1e-3), hta.Homotopy(L=0.1))
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        train_sampling_strategy="sequential",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],  # glue
        remove_unused_columns=False,  # glue
        **options,
    )
    return kind(replicas, arguments, train_dataset=dataset, eval_dataset=dataset, optimizers=(optimizer, None))


def equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("model", [gpt2, bert])
def test_it_is_the_loop_without_the_trainer(model, tmp_path):
    net, dataset = model(), data(model)
    plain = hta.Replicas(copy.deepcopy(net))
    trained = trainer(net, dataset, tmp_path, save_strategy="no", lr_scheduler_type="constant")
    trained.train()

    optimizer = hta.CoupledOptimizer(plain, hta.AdamW(lr=1e-3), hta.Homotopy(L=0.1))
    for _ in range(2):
        for i in range(0, 64, 8):
            batch = {name: torch.stack([row[name] for row in dataset[i : i + 8]]) for name in dataset[0]}
            plain(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)  # the Trainer's default
            optimizer.step()
            optimizer.zero_grad()
    equal(plain.state_dict(), trained.model.state_dict())


@pytest.mark.parametrize("model", [gpt2, bert])
def test_both_copies_train_and_are_evaluated(model, tmp_path):
    run = trainer(model(), data(model), tmp_path, save_strategy="no", bf16=True)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    theta, eta = run.predict(run.eval_dataset).predictions  # logits
    assert theta.shape == eta.shape == ((64, 16, 64) if model is gpt2 else (64, 2))
    assert (theta != eta).any() == (run.model.distance() > 0)


@pytest.mark.parametrize(("model", "kind"), [(gpt2, TiedTrainer), (bert, Trainer)])
def test_a_resumed_run_has_the_bits_of_an_unbroken_one(model, kind, tmp_path):
    net, dataset = model(dropout=0.1), data(model)
    options = {"save_strategy": "epoch", "gradient_accumulation_steps": 2}
    unbroken = trainer(net, dataset, tmp_path, kind, **options)
    unbroken.train()
    resumed = trainer(model(dropout=0.1), dataset, tmp_path, kind, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    equal(unbroken.model.state_dict(), resumed.model.state_dict())


def test_the_merged_model_is_an_ordinary_one(tmp_path):
    run = trainer(gpt2(), data(gpt2), tmp_path, save_strategy="no")
    run.train()
    merged = run.model.merge()
    merged.save_pretrained(tmp_path)
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    equal(merged.state_dict(), loaded.state_dict())
    assert loaded.generate(torch.tensor([[3, 4]]), max_new_tokens=5, do_sample=False).shape[1] > 2
