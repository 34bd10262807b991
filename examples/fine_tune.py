"""Fine-tunes EVACap on your own clips: `python examples/fine_tune.py clips/manifest.csv --output_dir runs/mine`.

A manifest (.csv or .jsonl) has a row for each clip: `id`, `media` (a file, relative to the manifest) and `caption`.
"""

import re
from pathlib import Path

import transformers

import evacap
from evacap.training.data.manifest import read_manifest


class Clips:
    def __init__(self, manifest, processor):
        self.processor = processor
        self.rows = [(clip, caption) for clip in read_manifest(manifest) for caption in clip.captions]
        if missing := [clip for clip, _ in self.rows if not clip.media or not Path(clip.media).is_file()]:
            raise FileNotFoundError(f"{manifest}: {missing[0].id} has no `media` file {missing[0].media}; fix its row")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):  # reads the file in every epoch: for many clips, see `evacap prepare`
        clip, text = self.rows[index]
        inputs = self.processor(clip.media, text, start=clip.start, duration=clip.duration, return_tensors="pt")
        return {name: values[0] for name, values in inputs.items()}


def add_new_words(model, tokenizer, captions):
    """Words that the vocabulary can only spell letter by letter, or not at all, become tokens of their own."""
    pieces = {word: tokenizer.tokenize(word) for word in re.findall(r"\w+", " ".join(captions).lower())}
    new = sorted(w for w, p in pieces.items() if tokenizer.unk_token in p or 1 < len(w) == len(p))
    if tokenizer.add_tokens([transformers.AddedToken(word, single_word=True, normalized=True) for word in new]):
        print(f"{len(new)} words are new to the model, and have to be learned from these clips: {', '.join(new)}")
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


if __name__ == "__main__":
    parser = transformers.HfArgumentParser(transformers.Seq2SeqTrainingArguments, description=__doc__)
    parser.add_argument("manifest", help="the clips to learn from")
    parser.add_argument("--validation", help="manifest of other clips, to be captioned in the end")
    parser.add_argument("--model", default=evacap.TINY, help="a model's folder or its name on the Hub")
    parser.set_defaults(output_dir="runs/fine_tuned", learning_rate=1e-4, num_train_epochs=10, save_strategy="epoch")
    parser.set_defaults(predict_with_generate=True, dataloader_pin_memory=transformers.utils.is_torch_cuda_available())
    arguments, options = parser.parse_args_into_dataclasses()
    processor = transformers.AutoProcessor.from_pretrained(options.model)
    model = transformers.AutoModel.from_pretrained(options.model)
    clips = Clips(options.manifest, processor)
    validation = Clips(options.validation, processor) if options.validation else None
    add_new_words(model, processor.tokenizer, [caption for _, caption in clips.rows])
    collator = evacap.EVACapDataCollator(p_mix=0.05, seed=arguments.seed)  # swaps 5% of the videos
    trainer = transformers.Seq2SeqTrainer(model, arguments, collator, clips, processing_class=processor)
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    if validation:
        trainer.data_collator = evacap.EVACapDataCollator(p_mix=0)
        print(*processor.batch_decode(trainer.predict(validation).predictions, skip_special_tokens=True), sep="\n")
