"""Write down what is said in a recording with Whisper: a Hugging Face script on lmkernels' attention.

python examples/transcribe.py openai/whisper-tiny speech.wav      # mono, 16 bits, at the model's rate (16 kHz)
python examples/transcribe.py openai/whisper-tiny                 # a tone that rises, for want of a recording
"""

import argparse
import wave

import numpy as np
from transformers import AutoFeatureExtractor, AutoTokenizer, WhisperForConditionalGeneration

import lmkernels.hf

lmkernels.hf.register()


def read_wav(path: str, rate: int) -> np.ndarray:
    """The samples of a recording, float32 from -1 to 1."""
    with wave.open(path) as file:
        found = file.getnchannels(), 8 * file.getsampwidth(), file.getframerate()
        if found != (1, 16, rate):
            raise ValueError(
                f"{path} must have 1 channel of 16 bits at {rate} Hz, got {found[0]}, {found[1]}, {found[2]}"
            )
        return np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768


def rising_tone(rate: int, seconds: float = 2.0) -> np.ndarray:
    """A sine that climbs from 200 to 800 Hz."""
    t = np.arange(int(rate * seconds)) / rate
    return (0.5 * np.sin(2 * np.pi * (200 * t + 300 / seconds * t**2))).astype(np.float32)


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a checkpoint, or its name on the Hugging Face hub")
    parser.add_argument("recording", nargs="?", help="a .wav file")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    options = parser.parse_args(arguments)

    extractor = AutoFeatureExtractor.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = WhisperForConditionalGeneration.from_pretrained(
        options.model,
        attn_implementation="lmkernels",  # the one line that is changed
    )
    rate = extractor.sampling_rate
    sound = read_wav(options.recording, rate) if options.recording else rising_tone(rate)
    features = extractor(sound, sampling_rate=rate, return_tensors="pt", return_attention_mask=True)
    tokens = model.generate(
        features["input_features"],
        attention_mask=features["attention_mask"],
        max_new_tokens=options.max_new_tokens,
    )
    text = tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    print(text)
    return text


if __name__ == "__main__":
    main()
