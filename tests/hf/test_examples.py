"""The examples that run a Hugging Face model, on tiny random ones: what they say is what eager attention says."""

import importlib.util
import wave
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from .tiny_models import MODELS, build

EXAMPLES = Path(__file__).parents[2] / "examples"
WORDS = [f"word{i}" for i in range(60)]


def example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checkpoint(name, folder, **options):
    """A folder with a tiny model and a tokenizer whose words are its tokens."""
    build(name, **options).save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def on_eager(name, folder):
    return getattr(transformers, MODELS[name][0]).from_pretrained(folder, attn_implementation="eager")


def test_translate(tmp_path):
    sentences = [" ".join(WORDS[:9]), "word5 word7"]  # of different lengths: padding
    tokenizer = checkpoint("marian", tmp_path)
    found = example("translate").main([str(tmp_path), *sentences, "--max-new-tokens", "8"])
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    tokens = on_eager("marian", tmp_path).generate(**batch, num_beams=4, max_new_tokens=8)
    assert found == tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert len(set(found)) == 2 and all("word" in text for text in found)


def test_summarise(tmp_path):
    tokenizer = checkpoint("bart", tmp_path)
    texts = [" ".join(WORDS * 3), " ".join(WORDS[:20])]  # the first is longer than the model's 64 positions
    files = [tmp_path / "long.txt", tmp_path / "short.txt"]
    for file, text in zip(files, texts):
        file.write_text(text)
    found = example("summarise").main([str(tmp_path), *map(str, files), "--max-new-tokens", "8"])
    batch = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="pt")
    tokens = on_eager("bart", tmp_path).generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        num_beams=4,
        max_new_tokens=8,
        no_repeat_ngram_size=3,
    )
    assert found == tokenizer.batch_decode(tokens, skip_special_tokens=True)
    assert len(set(found)) == 2 and all("word" in text for text in found)


@pytest.mark.parametrize("recorded", [False, True], ids=["tone", "wav"])
def test_transcribe(tmp_path, recorded):
    tokenizer = checkpoint("whisper", tmp_path, max_source_positions=50)
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    extractor.save_pretrained(tmp_path)
    module = example("transcribe")
    sound, arguments = module.rising_tone(16000), [str(tmp_path), "--max-new-tokens", "8"]
    if recorded:
        samples = np.random.default_rng(0).integers(-9000, 9000, 8000).astype(np.int16)
        with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
            file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
            file.writeframes(samples.tobytes())
        sound = samples.astype(np.float32) / 32768
        arguments.insert(1, str(tmp_path / "speech.wav"))
    found = module.main(arguments)
    features = extractor(sound, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
    assert features["input_features"].shape == (1, 8, 100)
    tokens = on_eager("whisper", tmp_path).generate(
        features["input_features"], attention_mask=features["attention_mask"], max_new_tokens=8
    )
    assert found == tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    assert "word" in found


def test_transcribe_refuses_another_rate(tmp_path):
    with wave.open(str(tmp_path / "speech.wav"), "wb") as file:
        file.setnchannels(2), file.setsampwidth(2), file.setframerate(44100)
    with pytest.raises(ValueError, match="must have 1 channel of 16 bits at 16000 Hz, got 2, 16, 44100"):
        example("transcribe").read_wav(str(tmp_path / "speech.wav"), 16000)


@pytest.mark.parametrize("layer", [None, 1])
def test_attention_map(tmp_path, layer):
    checkpoint("gpt2", tmp_path)
    picture = tmp_path / "map.png"
    arguments = [str(tmp_path), "word1 word2 word3 word4", "--out", str(picture)]
    maps = example("attention_map").main(arguments + ([] if layer is None else ["--layer", str(layer)]))
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    assert maps.shape == (2, 4, 4, 4)
    model = on_eager("gpt2", tmp_path)
    import torch

    expected = model(torch.tensor([[4 + i for i in (1, 2, 3, 4)]]), output_attentions=True).attentions
    for ours, theirs in zip(maps, expected):
        assert (ours - theirs[0]).abs().max() < 1e-5


def test_attention_map_refuses_a_layer_that_is_not_there(tmp_path, capsys):
    checkpoint("gpt2", tmp_path)
    with pytest.raises(SystemExit):
        example("attention_map").main([str(tmp_path), "word1", "--layer", "2"])
    assert "--layer must be from 0 to 1, got 2" in capsys.readouterr().err
