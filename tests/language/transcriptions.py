"""How published systems write a document as token ids, transcribed from their own code, to compare ours with.

Each function names the file and function that it transcribes, and says which parts were read and which are only
recalled from memory. None uses ar_unified or needs more than NumPy. The ids are the published ones.

Every function takes `text`, which gives the ids of a piece of text like the system's tokenizer, without special tokens
before or after it; and turns: the user's, the assistant's, the user's, ... A turn has parts in reading order, each a
text or the codes of an image. An odd number of turns is a prompt that waits for its answer.

All these systems first join strings and then call the tokenizer, so neighbouring texts are tokenized together.

Axes: `h` `w` height and width of an image in codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

Text = Callable[[str], Sequence[int]]
Part = str | np.ndarray  # or codes, int [h, w]
Turn = Sequence[Part]


def joined(text: Text, pieces: Iterable[str | int]) -> list[int]:
    """Ids of texts and ids: neighbouring texts are joined before the tokenizer sees them."""
    ids: list[int] = []
    run = ""
    for piece in pieces:
        if isinstance(piece, str):
            run += piece
        else:
            ids += [*(text(run) if run else ()), piece]
            run = ""
    return ids + list(text(run) if run else ())


def written(parts: Turn, image: Callable[[np.ndarray], list[str | int]]) -> list[str | int]:
    """Parts as texts and ids. image: a function that writes the codes of an image."""
    pieces: list[str | int] = []
    for part in parts:
        pieces += [part] if isinstance(part, str) else image(part)
    return pieces


# ---- Chameleon, Anole, Lumina-mGPT: the ids of Chameleon's text_tokenizer.json ---------------------------------------

CHAMELEON = {"bos": 0, "pad": 1, "eos": 2, "code": 4, "eoi": 8196, "boi": 8197, "eot": 8710}
LUMINA = CHAMELEON | {"eol": 8803, "size": 8804}  # size + n: n times 32 pixels, `<reserved(8800 + n)>`


def chameleon(text: Text, turns: Sequence[Turn], *, chat: bool = True) -> list[int]:
    """Chameleon and Anole: chameleon/inference/chameleon.py, TokenManager.tokens_from_ui, tokenize_image; vocab.py.

    Read: <s> is first. An image is BOI, its codes in reading order without sizes or line ends, and EOI (32 x 32 codes,
    but nothing here depends on that). Nothing is between the parts, and each text is tokenized by itself. The user's
    turn ends with <reserved08706>. The text decoder stops at </s>. Anole's interleaved prompts have no end of turn
    (chat=False), but its prompts for one image have one. Recalled: training documents end with </s>. Not read: the
    tokens between an answer and the next question; here <reserved08706>, as in Lumina-mGPT.
    """
    c = CHAMELEON
    ids = [c["bos"]]
    for i, turn in enumerate(turns):
        for part in turn:
            if isinstance(part, str):
                ids += text(part)
            else:
                ids += [c["boi"], *(part.ravel() + c["code"]).tolist(), c["eoi"]]
        if chat and (i % 2 == 0 or i + 1 < len(turns)):
            ids.append(c["eot"])
    return ids if chat and len(turns) % 2 else [*ids, c["eos"]]


def chameleon_contexts(ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """The two contexts that guidance compares a prompt with: only its images, and nothing. Both end before the codes of
    the new image.

    Chameleon: chameleon/inference/chameleon.py, ImageDecoder.__init__, _split_inputs_for_cfg. Read. The prompt gets a
    BOI if it has none at its end. Only the ids <s>, BOI, EOI and codes are kept, so the end of turn is dropped too.
    """
    c = CHAMELEON
    prompt = list(ids) if ids[-1] == c["boi"] else [*ids, c["boi"]]
    kept = {c["bos"], c["boi"], c["eoi"], *range(c["code"], c["code"] + 8192)}
    return [i for i in prompt if i in kept], [c["bos"], c["boi"]]


def _lumina_image(codes: np.ndarray, ids: Mapping[str, int], unit: int) -> list[str | int]:
    """unit: size tokens give a side in units of this many codes."""
    h, w = codes.shape
    if h % unit or w % unit:
        raise ValueError(f"Lumina-mGPT says sizes in units of {unit} codes; found {h} x {w}")
    body = np.concatenate([codes + ids["code"], np.full((h, 1), ids["eol"])], axis=1)
    return [ids["boi"], ids["size"] + h // unit, ids["size"] + w // unit, *body.ravel().tolist(), ids["eoi"]]


def _lumina(text: Text, turns: Sequence[Turn], ids: Mapping[str, int], unit: int) -> list[int]:
    pieces: list[str | int] = []
    for turn in turns:
        pieces += [*written(turn, lambda codes: _lumina_image(codes, ids, unit)), ids["eot"]]
    return [ids["bos"], *joined(text, pieces)]


def lumina_mgpt(text: Text, turns: Sequence[Turn]) -> list[int]:
    """Lumina-mGPT 1: lumina_mgpt/data/item_processor.py, FlexARItemProcessor.process_image; data/convertsation.py.

    And xllmx/data/item_processor.py, MMConvItemProcessor.process_item. Read: <s>, then all turns, each followed by
    <reserved08706>, also the answers. There is no </s>, and decoding stops at <reserved08706>. An image is BOI, height,
    width (each in units of 32 pixels, which are 2 codes), codes with a line end after every row, and EOI. The answers
    and their ends are learned. If the text has no place for an image, the image goes before the first question,
    followed by one space (see `implicit`). A prompt for an image is "Generate an image of {W}x{H} according to the
    following prompt:\\n{text}", width first, in pixels. Guidance compares with the ids from the last BOI on.
    """
    return _lumina(text, turns, LUMINA, unit=2)


def implicit(images: Sequence[np.ndarray], question: str) -> list[Part]:
    """The first turn of Lumina-mGPT if the question has no places for its images.

    xllmx/data/item_processor.py, MMConvItemProcessor.insert_implicit_media_symbol_in_q1. Read.
    """
    parts: list[Part] = []
    for image in images:
        parts += [image, " "]
    return [*parts[:-1], parts[-1] + question] if images else [question]  # type: ignore[operator]


LUMINA_2 = {"code": 155000, "boi": 151665, "eoi": 151666, "eol": 151670}


def lumina_mgpt_2(text: Text, turns: Sequence[Turn], *, bos: int, eot: int, size: int = 151671) -> list[int]:
    """Lumina-mGPT 2.0: the files of `lumina_mgpt` in that repository, and lumina_mgpt/inference_solver.py.

    Read: turns are as in `lumina_mgpt`. A code has 8 pixels per side, so a size of 32 pixels is 4 codes. The ids of
    code 0, BOI, EOI and EOL were read. Decoding stops at EOI, so no end of turn follows when an answer that is one
    image is drawn. bos is the tokenizer's, or its eos if it has no bos (Qwen's has none). Not read, because only the
    tokenizer's files have them: the ids of bos, eot (`<reserved08706>`) and sizes (`<reserved(8800 + n)>`). 151671 + n
    is concluded from `<reserved08799>`, which is 151670.
    """
    return _lumina(text, turns, LUMINA_2 | {"bos": bos, "eot": eot, "size": size}, unit=4)


# ---- Emu3 and Emu3.5: a text tokenizer of 151643 pieces, 208 special ones, and image codes ---------------------------

EMU3 = {
    "pad": 151643, "eol": 151846, "eof": 151847, "bos": 151849, "eos": 151850, "img": 151851, "boi": 151852,
    "eoi": 151853, "code": 151854,
}  # fmt: skip
EMU3_5 = EMU3 | {
    "frame": 151848, "boc": 151696, "eoc": 151697, "bog": 151706, "eog": 151707, "bss": 151746, "ess": 151747,
}  # fmt: skip


def _emu3_image(codes: np.ndarray) -> list[str | int]:
    h, w = codes.shape
    body = np.concatenate([codes + EMU3["code"], np.full((h, 1), EMU3["eol"])], axis=1)
    return [EMU3["boi"], f"{h}*{w}", EMU3["img"], *body.ravel().tolist(), EMU3["eof"], EMU3["eoi"]]


def emu3(text: Text, turns: Sequence[Turn], *, eos: bool = True) -> list[int]:
    """Emu3 without a chat: a caption and its image, or parts in any order.

    Original: emu3/train/datasets.py, Emu3FeatureDataset.__getitem__, format_image_prompt; emu3/mllm/processing_emu3.py,
    Emu3Processor.__call__ (mode "G"), to_imgstr; emu3/mllm/utils_emu3.py, Emu3PrefixConstrainedLogitsHelper. Port:
    transformers, models/emu3/processing_emu3.py, Emu3Processor, and modeling_emu3.py, Emu3ImageVocabularyMapping. Read.

    A document is BOS and the parts, with nothing between them. An image is BOI, "H*W" as a text of digits, IMG, codes
    with EOL after every row (also the last), EOF, and EOI. After EOI, decoding forces EOS, but the training samples of
    their repository have padding instead (eos=False). Text is first normalised to NFC (tokenization_emu3.py, tokenize).
    """
    (parts,) = turns
    return [EMU3["bos"], *joined(text, written(parts, _emu3_image)), *[EMU3["eos"]] * eos]


def emu3_prompt(text: Text, prompt: str, height: int, width: int) -> list[int]:
    """Emu3's prompt for an image of height x width codes: Emu3Processor.__call__, mode "G". Read.

    Guidance compares with the same ids for a negative prompt. Training replaces some prompts by "" (datasets.py).
    """
    return [EMU3["bos"], *joined(text, [prompt, EMU3["boi"], f"{height}*{width}", EMU3["img"]])]


def emu3_chat(text: Text, turns: Sequence[Turn]) -> list[int]:
    """Emu3-Chat: emu3/mllm/processing_emu3.py, Emu3Processor.__call__ (mode "U") and its default chat_template.

    Read: one question, with one image before its text. The template always adds a full stop after the text. Not read:
    several turns. Recalled: the answer ends with EOS.
    """
    question, *answer = turns
    asked = ["You are a helpful assistant. USER: ", *written(question, _emu3_image), ". ASSISTANT:"]
    if not answer:
        return [EMU3["bos"], *joined(text, asked)]
    return [EMU3["bos"], *joined(text, [*asked, *written(answer[0], _emu3_image), EMU3["eos"]])]


def _emu3_5_image(codes: np.ndarray) -> list[str | int]:
    h, w = codes.shape
    body = np.concatenate([codes + EMU3_5["code"], np.full((h, 1), EMU3_5["eol"])], axis=1)
    return [EMU3_5["boi"], f"{h}*{w}", EMU3_5["img"], *body.ravel().tolist()[:-1], EMU3_5["eoi"]]


def emu3_5(text: Text, turns: Sequence[Turn], *, task: str | None = "t2i") -> list[int]:
    """Emu3.5: src/utils/input_utils.py, format_image_string; configs/*.py, build_unc_and_template; inference.py.

    Read: BOS, a template around the question, BSS (<|extra_100|>), the answer. An image has EOL between its rows, but
    not after the last, and no EOF. In the template, an image is after the question (config.py) or before it
    (example_config_x2i.py); here it is where the parts have it. task=None gives the template that guidance compares
    with. It names no task, and has the images of the question but not its text. An answer ends with <|extra_101|> EOS
    (gradio_demo_*.py). If no size is forced, height and width have exactly two digits, and the first is not 0
    (src/utils/logits_processor.py). Not read: several turns.
    """
    question, *answer = turns
    role = "" if task is None else f" for {task} task"
    pieces: list[str | int] = [f"You are a helpful assistant{role}. USER: "]
    pieces += [*written(question, _emu3_5_image), " ASSISTANT: ", EMU3_5["bss"]]
    if answer:
        pieces += [*written(answer[0], _emu3_5_image), EMU3_5["ess"], EMU3_5["eos"]]
    return [EMU3_5["bos"], *joined(text, pieces)]


# ---- LWM: two tables, one of text and one of images; here the second follows the first -------------------------

LWM = {"bos": 1, "eos": 2, "vision": 32000, "eof": 8192, "eov": 8193}


def _lwm_frames(frames: Sequence[np.ndarray]) -> list[int]:
    ids: list[int] = []
    for i, codes in enumerate(frames):
        ids += [*codes.ravel().tolist(), LWM["eov"] if i + 1 == len(frames) else LWM["eof"]]
    return [LWM["vision"] + i for i in ids]


def lwm(text: Text, turns: Sequence[Turn], *, adds_bos: bool = True) -> list[int]:
    """LWM's training documents: lwm/data.py, VisionTextProcessor.__call__. Ids of the vision table begin at 32000.

    Read: a document is BOS, its fields, each encoded separately, and EOS. A text is what `tokenizer.encode` gives. An
    image or a video is encode("<vision>"), the codes of each frame followed by 8192 (the last frame by 8193), and
    encode("</vision>"). A frame has 16 x 16 codes. `encode` is called with its defaults. So if the tokenizer adds a BOS
    (adds_bos), there is one before every field, <vision> and </vision>. Llama's adds it by default; LWM's own
    configuration was not read. The data determine the fields and their words, and are not public.
    """
    (parts,) = turns

    def encode(run: str) -> list[int]:
        return [*[LWM["bos"]] * adds_bos, *text(run)]

    ids = [LWM["bos"]]
    for part in parts:
        if isinstance(part, str):
            ids += encode(part)
        else:
            ids += [*encode("<vision>"), *_lwm_frames([part]), *encode("</vision>")]
    return [*ids, LWM["eos"]]


def lwm_chat(text: Text, frames: Sequence[np.ndarray], question: str, *, adds_bos: bool = True) -> list[int]:
    """LWM asked about an image or a video: lwm/vision_chat.py, Sampler.construct_input. Read.

    "<s>" is written in the prompt, so a tokenizer that adds BOS gives two. The image follows the question.
    """
    bos = [LWM["bos"]] * adds_bos
    ids = [*bos, LWM["bos"], *text(f"You are a helpful assistant. USER: {question}\n"), *bos, *text("<vision>")]
    return [*ids, *_lwm_frames(frames), *bos, *text("</vision>"), *bos, *text(" ASSISTANT:")]


def lwm_prompt(text: Text, prompt: str, *, adds_bos: bool = True) -> tuple[list[int], list[int]]:
    """LWM's prompt for an image, and the context of guidance: lwm/vision_generation.py, main. Read.

    257 tokens are drawn after it, and the last is ignored. Here "<vision>" is tokenized together with the words before
    it, but in training separately. Only a real tokenizer can show whether the ids are the same.
    """
    bos = [LWM["bos"]] * (1 + adds_bos)
    asked = f"You are a helpful assistant. USER: Generate an image of {prompt} ASSISTANT: <vision>"
    return [*bos, *text(asked)], [*bos, *text("<vision>")]


# ---- Liquid: Gemma's tokenizer, with names of its own for three unused pieces ---------------------------------------

# Read: code 0 is len(tokenizer), 256000 of Gemma. Recalled: all others (boi, eoi and unconditional are <unused0..2>).
LIQUID = {
    "pad": 0, "eos": 1, "bos": 2, "boi": 7, "eoi": 8, "unconditional": 9, "start": 106, "end": 107, "code": 256000,
}  # fmt: skip


def liquid(text: Text, caption: str, codes: np.ndarray, *, instruction: str | None = None) -> list[int]:
    """Liquid draws: liquid/train/train.py, DataCollatorForSupervisedDataset.__call__ (T2I mode); inference_t2i.py.

    Read: BOS, the caption and an instruction that begins with a space (tokenized together), BOI, 32 x 32 codes, EOI,
    EOS. Codes, EOI and EOS are learned. With caption "", <unconditional> replaces caption and instruction, as in a
    tenth of the training; guidance compares with that.
    """
    c = LIQUID
    instruction = " Generate an image based on this description." if instruction is None else instruction
    asked = joined(text, [caption + instruction]) if caption else [c["unconditional"]]
    return [c["bos"], *asked, c["boi"], *(codes.ravel() + c["code"]).tolist(), c["eoi"], c["eos"]]


def liquid_caption(text: Text, codes: np.ndarray, caption: str) -> list[int]:
    """Liquid describes: the same function, caption mode. Read. Instruction and caption are tokenized separately."""
    c = LIQUID
    image = [c["boi"], *(codes.ravel() + c["code"]).tolist(), c["eoi"]]
    return [c["bos"], *image, *text("The caption of this image is:"), *text(caption), c["eos"]]


def liquid_chat(text: Text, turns: Sequence[Turn]) -> list[int]:
    """Liquid talks: evaluation/inference_i2t.py, main; conversation.py, conv_gemma; tokenizer_image_token. Read.

    A turn is <start_of_turn>user NEWLINE, the question, <end_of_turn> NEWLINE. An answer has "model" instead of "user",
    and <eos> after its last NEWLINE. The caller puts "\\n" after an image. Texts before and after an image are
    tokenized separately.
    """
    c = LIQUID

    def image(codes: np.ndarray) -> list[str | int]:
        return [c["boi"], *(codes.ravel() + c["code"]).tolist(), c["eoi"]]

    pieces: list[str | int] = []
    for i, turn in enumerate(turns):
        pieces += [c["start"], ("user\n", "model\n")[i % 2], *written(turn, image), c["end"], "\n"]
        pieces += [c["eos"]] * (i % 2)
    if len(turns) % 2:
        pieces += [c["start"], "model\n"]
    return [c["bos"], *joined(text, pieces)]


# ---- SimpleAR, Tar: names after the last of Qwen2.5's ----------------------------------------------------------------

# Read: the new names and their order; code 0 of SimpleAR is the length of the text tokenizer. Recalled: Qwen2.5's own
# ids, of which 151664 is the last.
QWEN_2_5 = {"pad": 151643, "eos": 151645}
SIMPLEAR = QWEN_2_5 | {"bos": 151665, "boi": 151667, "code": 151672}
TAR = QWEN_2_5 | {
    "bos": 151643,
    "pad": 151662,
    "turn": 151644,
    "boi": 151665,
    "eoi": 151666,
    "scale": 151667,
    "code": 151670,
}


def simplear(text: Text, caption: str, codes: np.ndarray) -> list[int]:
    """SimpleAR draws: simpar/train/preprocess.py, preprocess_t2i, and t2token_data.py. Read.

    <|t2i|>, the prompt, <|soi|>, and the codes, with nothing after them. The id of a code is its number + the length of
    the text tokenizer. A dropped prompt is empty.
    """
    c = SIMPLEAR
    return [c["bos"], *text(caption), c["boi"], *(codes.ravel() + c["code"]).tolist()]


def tar(codes: np.ndarray) -> list[str | int]:
    """The image that Tar draws, in an answer: llava/data/dataset.py, preprocess_multimodal; llava_arch.py,
    prepare_inputs_labels_for_multimodal. Read: <im_start>, the scale, the codes, <im_end>."""
    c = TAR
    return [c["boi"], c["scale"], *(codes.ravel() + c["code"]).tolist(), c["eoi"]]


def tar_chat(text: Text, turns: Sequence[Turn], system: str = "You are a helpful assistant.") -> list[int]:
    """Tar's conversations: llava/data/dataset.py, preprocess_qwen and its chat_template; t2i_inference.py. Read.

    A turn of the system, the user or the assistant is <|im_start|>, the speaker's name and a line end, the content,
    <|im_end|> and a line end. A question without an answer is followed by <|im_start|>assistant and a line end. In the
    original, an image of a question has no marks (preprocess_multimodal); here it has them, as in our grammar.
    """
    c = TAR
    said: list[tuple[str, Turn]] = [("system", [system])]
    said += [(("user", "assistant")[i % 2], turn) for i, turn in enumerate(turns)]
    pieces: list[str | int] = []
    for who, parts in said:
        pieces += [c["turn"], f"{who}\n", *written(parts, tar), c["eos"], "\n"]
    if len(turns) % 2:
        pieces += [c["turn"], "assistant\n"]
    return joined(text, pieces)
