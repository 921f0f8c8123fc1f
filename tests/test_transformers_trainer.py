# SPDX-License-Identifier: Apache-2.0
"""transformers' `Trainer` and TRL's `SFTTrainer` with KronA on a tiny Llama: train, save, resume, best model, merge."""

import json
import math

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from peft_krona import KronAConfig, KronALayer

STEPS = 4


def base_model(width=16):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def config(**fields):
    return KronAConfig(a_out=4, a_in=2, task_type="CAUSAL_LM", **fields)


def data(n=8):
    rows = torch.randint(3, 32, (n, 6), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(folder, cls=TrainingArguments, **fields):
    return cls(
        output_dir=str(folder), use_cpu=True, max_steps=STEPS, per_device_train_batch_size=2, learning_rate=0.05,
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, report_to=[], disable_tqdm=True,
        dataloader_pin_memory=False, bf16=False, seed=3, **fields,
    )  # fmt: skip


def factors(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "krona_" in n and "default" in n}


def assert_equal(a, b):
    assert a.keys() == b.keys() and a
    for name in a:
        assert torch.equal(a[name], b[name]), name


def trained_with_trainer(folder, resume=None, **fields):
    model = get_peft_model(base_model(), config())
    trainer = Trainer(model, arguments(folder, **fields), train_dataset=data(), eval_dataset=data(2))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trained_with_sft(folder, resume=None, **fields):
    pytest.importorskip("trl", reason="needs trl: pip install trl")
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        base_model(), arguments(folder, SFTConfig, **fields), processing_class=tokenizer(), peft_config=config(),
        train_dataset=Dataset.from_list(data()), eval_dataset=Dataset.from_list(data(2)),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(29))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("train", [trained_with_trainer, trained_with_sft], ids=["Trainer", "SFTTrainer"])
def test_from_training_to_a_merged_model(train, tmp_path, float64):
    trainer = train(tmp_path / "run")
    model = trainer.model
    assert isinstance(model, PeftModel)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(factors(model)) and trainable
    start = factors(get_peft_model(base_model(), config()))
    assert all(not torch.equal(factors(model)[name], start[name]) for name in start if "krona_B" in name)

    # resumed in the middle: bit for bit the run that was not stopped
    again = train(tmp_path / "resumed", resume=str(tmp_path / "run" / "checkpoint-2"))
    assert again.state.global_step == STEPS
    assert_equal(factors(again.model), factors(model))

    # saved: the adapter alone, and loaded again
    trainer.save_model(str(tmp_path / "saved"))
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["peft_type"] == "KRONA"
    assert (tmp_path / "saved" / "adapter_model.safetensors").stat().st_size < 20_000
    assert "import peft_krona" in (tmp_path / "saved" / "README.md").read_text()
    ids = torch.tensor([[3, 4, 5]])
    model.eval()
    loaded = PeftModel.from_pretrained(base_model(), str(tmp_path / "saved"))
    assert torch.equal(loaded(ids).logits, model(ids).logits)

    # generates, and does so after it was merged
    words = model.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    logits = model(ids).logits
    assert words.shape[1] > 3 and not torch.equal(base_model()(ids).logits, logits)
    merged = loaded.merge_and_unload()
    assert type(merged) is LlamaForCausalLM and not any(isinstance(m, KronALayer) for m in merged.modules())
    torch.testing.assert_close(merged(ids).logits, logits)
    assert torch.equal(merged.generate(input_ids=ids, max_new_tokens=5, do_sample=False), words)


@pytest.mark.parametrize("train", [trained_with_trainer, trained_with_sft], ids=["Trainer", "SFTTrainer"])
@pytest.mark.parametrize("greatest", [True, False])
def test_the_best_model_is_loaded_at_the_end(train, greatest, tmp_path):
    trainer = train(
        tmp_path, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=greatest
    )
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    best = (max if greatest else min)(losses, key=losses.get)
    assert losses[2] != losses[STEPS] and trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    kept = PeftModel.from_pretrained(base_model(), str(tmp_path / f"checkpoint-{best}"))
    assert_equal(factors(trainer.model), factors(kept))
    other = PeftModel.from_pretrained(base_model(), str(tmp_path / f"checkpoint-{2 if best == STEPS else STEPS}"))
    assert any(not torch.equal(a, b) for a, b in zip(factors(other).values(), factors(kept).values(), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter_of_transformers_own(checkpointing, tmp_path):
    """`model.add_adapter`, without a PeftModel: the Trainer saves the adapter alone."""
    model = base_model()
    model.add_adapter(config())
    trainer = Trainer(
        model, arguments(tmp_path, gradient_checkpointing=checkpointing), train_dataset=data(), eval_dataset=data(2)
    )
    trainer.train()
    assert_equal(factors(trainer.model), factors(model))
    trainer.save_model(str(tmp_path / "saved"))
    loaded = base_model()
    loaded.load_adapter(str(tmp_path / "saved"))
    assert_equal(factors(loaded), factors(model))
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_the_reference_adapter_of_trl_is_a_copy(caplog):
    """TRL copies weights by names that only LoRA's have; DPO, KTO, GRPO and RLOO do it in the same lines."""
    model = get_peft_model(base_model(), config(init_weights=False))
    model.add_adapter("other", model.peft_config["default"])
    model.add_adapter("ref", model.peft_config["default"])
    assert "Adapter 'ref' starts as a copy of 'default'" in caplog.text and caplog.text.count("copy of") == 1
    weights = {n: p for n, p in model.named_parameters() if "krona_" in n}
    for name, p in weights.items():
        if name.endswith(".default"):
            start = name.removesuffix("default")
            assert torch.equal(weights[f"{start}ref"], p) and not torch.equal(weights[f"{start}other"], p)
            assert p.requires_grad and not weights[f"{start}ref"].requires_grad
    apart = get_peft_model(base_model(), config(init_weights=False))
    apart.add_adapter("ref", config(init_weights=False))
    weights = {n: p for n, p in apart.named_parameters() if "krona_" in n}
    assert not any(torch.equal(weights[f"{n[:-7]}ref"], p) for n, p in weights.items() if n.endswith(".default"))


def test_dpo_of_a_trained_adapter_refers_to_it(tmp_path):
    pytest.importorskip("trl", reason="needs trl: pip install trl")
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    model = get_peft_model(base_model(), config(init_weights=False))
    start = factors(model)
    rows = [{"prompt": "w1 w2", "chosen": f"w{i} w4", "rejected": f"w{i} w7"} for i in range(8)]
    trainer = DPOTrainer(
        model, args=arguments(tmp_path, DPOConfig, logging_steps=1, gradient_checkpointing=False),
        processing_class=tokenizer(), train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows[:2]),
    )  # fmt: skip
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)  # policy and reference are one at first; logged rounded
    assert losses[-1] < losses[0]
    after = {n: p for n, p in trainer.model.named_parameters() if "krona_" in n}
    for name, p in start.items():
        assert torch.equal(after[f"{name.removesuffix('default')}ref"], p) and not torch.equal(after[name], p)


def test_sft_on_a_4_bit_base(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    pytest.importorskip("trl", reason="needs trl: pip install trl")
    from datasets import Dataset
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    whole = base_model(64)  # the kernels for 4 bits need that much
    whole.save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization, device_map="cpu")
    packed = model.model.layers[0].self_attn.q_proj.weight.clone()
    trainer = SFTTrainer(
        model, arguments(tmp_path / "run", SFTConfig), processing_class=tokenizer(), peft_config=config(),
        train_dataset=Dataset.from_list(data()), eval_dataset=Dataset.from_list(data(2)),
    )  # fmt: skip
    trainer.train()
    layer = trainer.model.base_model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, KronALayer) and type(layer.base_layer).__name__ == "Linear4bit"
    assert layer.krona_B["default"].abs().max() > 0 and torch.equal(layer.base_layer.weight, packed)
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert losses[-1] < losses[0]
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(base_model(64), str(tmp_path / "saved"))  # onto the unquantized base
    assert_equal(factors(loaded), {n: p.float() for n, p in factors(trainer.model).items()})


def t5():
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def classifier(cls):
    def build():
        torch.manual_seed(0)
        return cls(LlamaConfig(num_labels=3, **base_model().config.to_diff_dict()))

    return build


# {task type: (model, labels of a row, the head that is trained whole)}
TASKS = {
    "SEQ_CLS": (classifier(LlamaForSequenceClassification), lambda i, ids: i % 3, "score"),
    "TOKEN_CLS": (classifier(LlamaForTokenClassification), lambda i, ids: [w % 3 for w in ids], "score"),
    "SEQ_2_SEQ_LM": (t5, lambda i, ids: ids[:4], None),
}


@pytest.mark.parametrize("task", TASKS)
def test_other_tasks(task, tmp_path, float64):
    build, labels, head = TASKS[task]
    rows = [{"input_ids": r["input_ids"], "labels": labels(i, r["input_ids"])} for i, r in enumerate(data())]
    model = get_peft_model(build(), KronAConfig(a_out=4, a_in=2, task_type=task))
    trained = {n.rpartition(".")[0].rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"krona_A", "krona_B", *(["default"] if head else [])}  # score.modules_to_save.default.weight
    trainer = Trainer(model, arguments(tmp_path / "run"), train_dataset=rows, eval_dataset=rows[:2])
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    batch = {"input_ids": torch.tensor([rows[0]["input_ids"]])}
    batch |= {"decoder_input_ids": torch.tensor([[0, 5]])} if task == "SEQ_2_SEQ_LM" else {}
    logits = model.eval()(**batch).logits
    loaded = PeftModel.from_pretrained(build(), str(tmp_path / "saved"))
    assert torch.equal(loaded(**batch).logits, logits) and not torch.equal(build().eval()(**batch).logits, logits)
    torch.testing.assert_close(loaded.merge_and_unload()(**batch).logits, logits)
