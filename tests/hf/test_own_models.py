"""lmkernels.models in the tools of others: pipelines, peft, pickle, FSDP2 and its checkpoints."""

import copy
import os
import pickle

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers, processors  # noqa: E402

from lmkernels.models import (  # noqa: E402
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(55))]
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
GPT = {"n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 2, "eos_token_id": 2}
LLAMA = {"norm": "rms_norm", "position": "rotary", "mlp": "swiglu", "num_kv_heads": 1, "bias": False}
BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BERT |= {"max_position_embeddings": 32, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def gpt(**options):
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), initializer_range=0.3, **GPT, **NO_DROPOUT, **options))


def bert(model_class=BertForMaskedLM):
    torch.manual_seed(0)
    return model_class(BertConfig(vocab_size=len(WORDS), initializer_range=0.3, **BERT))


def ids(rows=4):
    return torch.randint(5, len(WORDS), (rows, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.mark.parametrize(
    "task, model, options",
    [
        ("text-generation", gpt, {"max_new_tokens": 6, "do_sample": False}),
        ("text-generation", gpt, {"max_new_tokens": 6, "num_beams": 3, "return_full_text": False}),
        ("text-generation", gpt, {"max_new_tokens": 6, "do_sample": True, "top_k": 5}),
        ("fill-mask", bert, {"top_k": 3}),
        ("text-classification", lambda: bert(BertForSequenceClassification), {"top_k": None}),
        ("token-classification", lambda: bert(BertForTokenClassification), {}),
    ],
    ids=["greedy", "beams", "sampled", "fill-mask", "classes", "names"],
)
def test_pipelines(tmp_path, tokenizer, task, model, options):
    model = model().eval()
    model.save_pretrained(tmp_path)
    theirs = getattr(transformers, type(model).__name__).from_pretrained(tmp_path)
    tokenizer.padding_side = "left" if task == "text-generation" else "right"
    texts, found = ["w1 w2 [MASK] w3", "w9 [MASK]"], []
    for each in (model, theirs):
        pipe = transformers.pipeline(task, model=each, tokenizer=tokenizer, device="cpu")
        torch.manual_seed(1)
        found.append(pipe(texts, batch_size=2, **options))
    assert len(found[0]) == 2 and rounded(found[0]) == rounded(found[1])


def rounded(answer):
    """Its floats to five places."""
    if isinstance(answer, dict):
        return {key: rounded(value) for key, value in answer.items()}
    if isinstance(answer, list):
        return [rounded(each) for each in answer]
    return answer if isinstance(answer, (str, int)) or answer is None else round(float(answer), 5)


@pytest.mark.parametrize("name", ["gpt", "llama", "bert"])
def test_lora(tmp_path, name):
    """Adapters learn, act in generation, and are merged; of a GPT-2 and a BERT as in transformers' models."""
    peft = pytest.importorskip("peft")
    targets = {
        "gpt": ["c_attn", "c_proj", "c_fc"],
        "llama": ["c_attn", "c_proj", "c_gate", "c_up"],
        "bert": ["query", "dense"],
    }[name]
    kind = {} if name == "bert" else {"task_type": "CAUSAL_LM", "fan_in_fan_out": True}

    def adapted(model):
        torch.manual_seed(2)
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **kind)
        model = peft.get_peft_model(model, config).train()
        model(input_ids=ids(), labels=ids()).loss.backward()
        return model.eval()

    model = bert() if name == "bert" else gpt(**(LLAMA if name == "llama" else {}))
    model.save_pretrained(tmp_path)
    plain = model(input_ids=ids()).logits
    ours = adapted(model)
    gradients = {n: p.grad for n, p in ours.named_parameters() if p.requires_grad}
    assert len(gradients) >= 16 and all(gradient.abs().max() > 0 for gradient in gradients.values())
    logits = ours(input_ids=ids()).logits
    assert (logits - plain).abs().max() > 0.5
    if name != "llama":
        theirs = adapted(getattr(transformers, type(model).__name__).from_pretrained(tmp_path))
        torch.testing.assert_close(logits, theirs(input_ids=ids()).logits, rtol=1e-4, atol=1e-4)
        for n, p in theirs.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(gradients[n], p.grad, rtol=1e-3, atol=1e-3 * p.grad.abs().max(), msg=n)
    options = {"max_new_tokens": 6, "do_sample": False}
    written = None if name == "bert" else ours.generate(input_ids=ids()[:, :4], **options)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids()).logits, logits, rtol=1e-4, atol=1e-4)
    assert written is None or torch.equal(merged.generate(ids()[:, :4], **options), written)


@pytest.mark.parametrize("options", [{}, LLAMA], ids=["gpt", "llama"])
def test_a_watched_layer_is_called(options):
    model = gpt(**options).eval()
    expected, seen = model(ids()).logits, []
    for name, module in model.named_modules():
        if name.rpartition(".")[2].startswith("c_"):
            module.register_forward_hook(lambda module, arguments, out: seen.append(out.shape[-1]))
    torch.testing.assert_close(model(ids()).logits, expected, rtol=1e-4, atol=1e-4)
    assert len(seen) == 2 * (5 if options else 4)


def test_a_gpt_is_pickled_and_copied_though_peft_takes_its_layers_for_those_of_transformers():
    model = gpt().eval()
    expected = model(ids()).logits
    layer = model.transformer.h[0].attn.c_attn
    assert isinstance(layer, transformers.pytorch_utils.Conv1D) and type(layer) is not transformers.pytorch_utils.Conv1D
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(twin(ids()).logits, expected) and type(twin.transformer.h[0].attn.c_attn) is type(layer)
        assert twin.lm_head.weight is twin.transformer.wte.weight


def step(model, x):
    model.train()
    model(x, labels=x).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def sharded_step(rank: int, folder: str) -> None:
    """One of two processes: a step of FSDP2 on half of the batch, and a checkpoint of both."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    for make in (gpt, bert):
        model = make()
        for module in list(model.modules()):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module)
        fully_shard(model)
        step(model, ids().chunk(2)[rank])
        dcp.save(get_model_state_dict(model), checkpoint_id=os.path.join(folder, make.__name__))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_fsdp2_on_two_processes_is_one_process_and_its_checkpoint_loads_in_one(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    torch.multiprocessing.spawn(sharded_step, (str(tmp_path),), nprocs=2)
    for make in (gpt, bert):
        expected, loaded = make(), make()
        step(expected, ids())
        tensors = get_model_state_dict(loaded)
        dcp.load(tensors, checkpoint_id=tmp_path / make.__name__)
        set_model_state_dict(loaded, tensors)
        for (name, p), (_, q) in zip(loaded.named_parameters(), expected.named_parameters()):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)
