"""Makes a small model to time with: a byte-level BPE tokenizer learnt from the data, and random llama weights.

    python benches/peer/make_model.py --data forget10.jsonl retain90.jsonl --out models/bench     # 29.5 M weights

Every string value of the JSONL rows is training text. The same data gives the same folder.
"""

import argparse
import json

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def main():
    args = arguments()
    transformers.logging.disable_progress_bar()
    tokenizer = learn_tokenizer(args.data, args.vocab)
    tokenizer.save_pretrained(args.out)
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.mlp, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, num_key_value_heads=args.heads, max_position_embeddings=2048,
        initializer_range=0.02, rms_norm_eps=1e-5, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))
    model.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters():,} weights, vocabulary {len(tokenizer)}")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help="JSONL files")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--mlp", type=int, default=1376)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def learn_tokenizer(files, vocab):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=False)
    bpe.train_from_iterator(texts(files), trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    assert bpe.get_vocab_size() == vocab, f"the data only gives {bpe.get_vocab_size()} tokens"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|pad|>")


def texts(files):
    for file in files:
        with open(file, encoding="utf-8") as lines:
            for line in lines:
                yield from (value for value in json.loads(line).values() if isinstance(value, str))


if __name__ == "__main__":
    main()
