"""Synthesise a small corpus in LibriSpeech's layout with eSpeak NG, for the demo and its tests.

    pip install -r requirements-demo.txt
    python -m demo.synthesize_speech --out data/demo_speech --minutes 10 --seed 0

Writes 16 kHz mono FLAC below train-clean-100 and dev-clean, and the texts in LibriSpeech's
SPEAKER-CHAPTER.trans.txt. No voice and no sentence is in both splits. The sentences come from a small
grammar of everyday words; the same options give the same files.
"""

import argparse
import ctypes
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import soundfile

import cli
from wav2vec2.audio import SAMPLE_RATE, resample_to_16k
from wav2vec2.files.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

VALID_FRACTION = 0.15

# eSpeak NG variants (files of its voices/!v) that speak in each split. None has "breath", whose noise differs from
# run to run.
TRAIN_VARIANTS = [
    *("m1", "f1", "m2", "f4", "m3", "Annie", "m4", "Andrea", "m7", "belinda", "Alex", "linda", "Andy", "anika"),
    *("Gene", "steph", "Michael", "aunty", "adam", "steph2", "Lee", "shelby"),
]
VALID_VARIANTS = ["m5", "steph3", "edward", "grandma", "paul", "grandpa"]
ACCENTS = ("en-us", "en", "en-us-nyc", "en-gb-scotland", "en-gb-x-rp", "en-029", "en-gb-x-gbclan", "en-gb-x-gbcwmd")

MIN_UTTERANCE_SECONDS = 3.0
MAX_UTTERANCE_SECONDS = 9.0
TARGET_RMS = 0.06  # about the level of read speech in LibriSpeech
MAX_PEAK = 0.9

_WORDS = {
    "person": """my sister|the baker|our neighbour|a young doctor|the night watchman|Martha|George|the old fisherman|
    a quiet student|the mayor|your cousin|Oliver|the woman next door|a tired driver|Judith|the gardener|two children|
    the postman|his grandmother|a visiting painter|the choir|Thomas|the shop assistant|a Russian pilot|everybody""",
    "verb": """found|carried|sold|borrowed|painted|forgot|measured|washed|hid|noticed|photographed|dropped|repaired|
    admired|counted|wrapped|described|bought|lost|polished|chose|sketched|pushed|weighed""",
    "adjective": """heavy|broken|yellow|ordinary|delicious|narrow|ancient|cheap|shining|curious|frozen|enormous|purple|
    wooden|thin|useless|foreign|gentle|dusty|round|sharp|valuable|half finished|awkward|fresh""",
    "thing": """bicycle|lantern|cheese|violin|umbrella|bridge|chair|map of the valley|jar of honey|telescope|coat|
    ladder|kettle|basket of oranges|photograph|wheel|garden gate|notebook|fishing boat|clock|sausage|jewel|thermometer|
    pair of boots|blanket|mushroom pie|treasure chest|engine|cherry tree|window""",
    "place": """behind the station|near the harbour|in the village square|under the kitchen table|at the edge of town|
    beside the river|on the third floor|outside the theatre|in a cold cellar|along the southern road|
    between two hedges|above the workshop|in the middle of the forest|by the fountain|across the meadow""",
    "time": """last Thursday|before breakfast|in early spring|at half past seven|during the storm|after the concert|
    many years ago|on a foggy morning|just in time|twice a week|as usual|the following evening|around noon|
    without a word|with great pleasure""",
    "link": "and|but|because|while|although|until|so|and then|after",
    "remark": """nobody asked why|the weather was changing|it was far too late|there was plenty of room|
    they both laughed|the dog would not stop barking|it cost almost nothing|the lights went out|
    we had to start again|
    that was only the beginning|the road had vanished under snow|no answer ever came|the soup was getting cold""",
}
VOCABULARY = {name: [" ".join(entry.split()) for entry in words.split("|")] for name, words in _WORDS.items()}
TEMPLATES = (
    "{person} {verb} the {adjective} {thing} {place}",
    "{time}, {person} {verb} the {adjective} {thing}",
    "{person} {verb} that {thing} {time}, {link} {remark}",
    "{time}, {person} {verb} one {adjective} {thing} {place}, {link} {remark}",
    "the {adjective} {thing} {place} is what {person} {verb} {time}",
    "{person} {verb} the {thing}, {link} {person} {verb} another {adjective} {thing} {place}",
    "{link} {remark}, {person} {verb} this {adjective} {thing} {time}",
)


def sentences(seed: int) -> Iterator[str]:
    """Yield endless sentences, in lower case with commas, none of them twice."""
    choose = random.Random(seed)
    said: set[str] = set()
    while True:
        template = choose.choice(TEMPLATES)
        words = re.sub(r"{(\w+)}", lambda gap: choose.choice(VOCABULARY[gap[1]]), template)
        if words not in said:
            said.add(words)
            yield words


class Speaker(NamedTuple):
    """One voice: an eSpeak NG voice name, words per minute, pitch and its range (both 0 to 100)."""

    speaker_id: int
    voice: str
    rate: int
    pitch: int
    pitch_range: int


def make_speakers(variants: list[str], first_id: int, seed: int) -> list[Speaker]:
    """Make a speaker of each variant, with the accents in turn and random rate and pitch."""
    draw = random.Random(f"{seed} {first_id}")
    return [
        Speaker(
            speaker_id=first_id + number,
            voice=f"{ACCENTS[number % len(ACCENTS)]}+{variant}",
            rate=draw.randint(140, 185),
            pitch=draw.randint(30, 70),
            pitch_range=draw.randint(35, 65),
        )
        for number, variant in enumerate(variants)
    ]


class Espeak:
    """eSpeak NG through its C interface (``speak_lib.h``, whose constants these are).

    ``folder`` is empty, has a short name, and lives as long as this object: it holds a link to the data.
    """

    AUDIO_OUTPUT_SYNCHRONOUS, DONT_EXIT = 2, 0x8000
    POSITION_CHARACTER, CHARS_UTF8 = 1, 1
    RATE, PITCH, RANGE = 1, 3, 4

    def __init__(self, folder: Path) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise UserError(
                "eSpeak NG, which speaks the demo's sentences, is not installed; "
                "pip install -r requirements-demo.txt, or use recorded speech"
            ) from error
        data = espeakng_loader.get_data_path()
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._library.espeak_Synth.argtypes = [
            *(ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint),
            *(ctypes.c_void_p, ctypes.c_void_p),
        ]
        self._variants = Path(data) / "voices" / "!v"
        # A virtual environment's path can be longer than the 160 characters that eSpeak NG has room for.
        link = folder / "espeak-ng-data"
        link.symlink_to(data)
        self.sample_rate: int = self._library.espeak_Initialize(
            self.AUDIO_OUTPUT_SYNCHRONOUS, 0, str(link).encode(), self.DONT_EXIT
        )
        if self.sample_rate <= 0:
            raise UserError(
                f"eSpeak NG cannot open its data in {data} through the link {link}; "
                "pip install --force-reinstall espeakng-loader, or set TMPDIR to a folder with a shorter name"
            )
        self._chunks: list[np.ndarray] = []
        callback_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._callback = callback_type(self._collect)  # kept: C holds a bare pointer to it
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples: Any, num_samples: int, _events: int | None) -> int:
        """Take the next piece of speech from eSpeak NG, whose last call comes without samples."""
        if samples:
            self._chunks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        return 0

    def set_speaker(self, speaker: Speaker) -> None:
        """Speak as ``speaker`` from now on."""
        # eSpeak NG ignores a variant that does not exist, hence the look at the file.
        variant = self._variants / speaker.voice.partition("+")[2]
        if not variant.is_file() or self._library.espeak_SetVoiceByName(speaker.voice.encode()) != 0:
            raise UserError(
                f"eSpeak NG has no voice {speaker.voice!r}; pip install the version in requirements-demo.txt"
            )
        self._library.espeak_SetParameter(self.RATE, speaker.rate, 0)
        self._library.espeak_SetParameter(self.PITCH, speaker.pitch, 0)
        self._library.espeak_SetParameter(self.RANGE, speaker.pitch_range, 0)

    def say(self, text: str) -> "Tensor":
        """Speak: (T,) float32 at ``self.sample_rate``."""
        import torch  # takes seconds, for which wrong flags need not wait

        self._chunks.clear()
        encoded = text.encode()
        self._library.espeak_Synth(
            encoded, len(encoded) + 1, 0, self.POSITION_CHARACTER, 0, self.CHARS_UTF8, None, None
        )
        self._library.espeak_Synchronize()
        return torch.from_numpy(np.concatenate(self._chunks)).float() / 2**15


def write_speaker(espeak: Espeak, speaker: Speaker, texts: Iterator[str], folder: Path, min_seconds: float) -> float:
    """Write at least one utterance and at least ``min_seconds`` of a speaker; returns the seconds written.

    Sentences that last 3 s to 9 s are written, at an even level.
    """
    espeak.set_speaker(speaker)
    chapter = f"{speaker.speaker_id}-{100_000 + speaker.speaker_id}"
    chapter_folder = folder.joinpath(*chapter.split("-"))
    chapter_folder.mkdir(parents=True, exist_ok=True)
    transcript: list[str] = []
    seconds = 0.0
    for text in texts:
        speech = resample_to_16k(espeak.say(text), espeak.sample_rate)
        if not MIN_UTTERANCE_SECONDS <= len(speech) / SAMPLE_RATE <= MAX_UTTERANCE_SECONDS:
            continue
        speech *= min(TARGET_RMS / speech.square().mean().sqrt(), MAX_PEAK / speech.abs().max())
        name = f"{chapter}-{len(transcript):04d}"
        soundfile.write(chapter_folder / f"{name}.flac", speech.numpy(), SAMPLE_RATE, subtype="PCM_16")
        transcript.append(f"{name} {text.replace(',', '').upper()}\n")
        seconds += len(speech) / SAMPLE_RATE
        if seconds >= min_seconds:
            break
    (chapter_folder / f"{chapter}.trans.txt").write_text("".join(transcript), encoding="utf-8")
    return seconds


def main(args: argparse.Namespace) -> None:
    """Speak both splits, each voice its share of the minutes."""
    if not args.minutes > 0:
        raise UserError(f"--minutes {args.minutes:g}: expected more than 0")
    texts = sentences(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        espeak = Espeak(Path(folder))
        for split, variants, first_id, share in (
            ("train-clean-100", TRAIN_VARIANTS, 1001, 1 - VALID_FRACTION),
            ("dev-clean", VALID_VARIANTS, 2001, VALID_FRACTION),
        ):
            seconds = 0.0
            for number, speaker in enumerate(make_speakers(variants, first_id, args.seed), start=1):
                # Measured against the running total: what one voice says too much, the next says less.
                due = args.minutes * 60 * share * number / len(variants) - seconds
                seconds += write_speaker(espeak, speaker, texts, Path(args.out) / split, due)
            print(f"{split}: {seconds / 60:.1f} minutes of {len(variants)} voices")


if __name__ == "__main__":
    parser = cli.make_parser(__doc__)
    parser.add_argument("--out", required=True, help="folder to write the corpus to")
    parser.add_argument("--minutes", type=float, default=10.0, help="speech in both splits together")
    parser.add_argument("--seed", type=int, default=0, help="chooses sentences, speaking rates and pitches")
    cli.run(main, parser.parse_args())
