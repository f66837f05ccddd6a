"""Count a card's hashtags, or the nouns of its captions, into the vocabulary that the second stage
predicts.

python datasets/hashtags.py demo --min-count 5 --out data/demo/hashtags.json
python datasets/hashtags.py web --synsets wordnet --min-count 100 --out data/web/synsets.json
python datasets/hashtags.py web --captions --min-count 500 --most 24320 --out data/web/nouns.json
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from prepretrain.data.sampling.mix import open_together
from prepretrain.data.tags import counting, rarest
from prepretrain.data.tags.synsets import Synsets
from prepretrain.data.tags.vocabulary import Vocabulary
from prepretrain.data.tags.wordnet import Nouns


def main() -> None:
    """Count, write, and show the most frequent labels and how many images are left without one."""
    args = _asked()
    source = open_together(args.card)
    of = "captions" if args.captions else "hashtags"
    _check_fields(args.card, source.fields, of)
    synsets = _synsets(args, of)
    rule = {} if synsets is None else {"label": synsets.label, "merged": synsets.merged}
    vocabulary, tag_of_images, counts = counting.count(
        source, args.out.parent, of=of, min_count=args.min_count, most=args.most, **rule
    )
    counts.log()
    vocabulary.save(args.out)
    rarest.write(args.out, vocabulary, tag_of_images)
    _show(vocabulary, args.top)
    if synsets is not None:
        _show_rule(synsets, vocabulary, args.top)
    without = int((tag_of_images < 0).sum())
    print(
        f"{args.out}: {len(vocabulary)} tags in at least {args.min_count} of {len(source)} "
        f"images; {without} images have none of them"
    )


def _asked() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("card", help="a card, or card:split; several of a mix as web+shop")
    parser.add_argument(
        "--min-count", type=int, required=True, help="how many images a tag must be in"
    )
    parser.add_argument("--most", type=int, help="how many tags to keep, the most frequent ones")
    parser.add_argument("--out", type=Path, required=True, help="the vocabulary to write")
    parser.add_argument("--top", type=int, default=20, help="how many tags to show")
    parser.add_argument(
        "--synsets",
        metavar="LIST",
        help="merge the tags of one WordNet synset: timm (its list), wordnet (Debian's wordnet-base), a "
        "folder with WordNet's files, or a file with a line a synset: id, tab, its words with commas",
    )
    parser.add_argument(
        "--ambiguous",
        choices=("first", "drop"),
        default="first",
        help="a tag of several synsets: its first sense, or left out (default: first)",
    )
    parser.add_argument(
        "--unmapped",
        choices=("keep", "drop"),
        default="keep",
        help="a tag of no synset: a tag of its own, or left out (default: keep)",
    )
    parser.add_argument(
        "--captions",
        action="store_true",
        help="label by the nouns of captions as CatLIP does (with --synsets wordnet, or such a folder)",
    )
    return parser.parse_args()


def _check_fields(card: str, fields: tuple[str, ...], of: str) -> None:
    wanted = ("text", "captions") if of == "captions" else ("hashtags",)
    if not set(wanted) & set(fields):
        raise ValueError(
            f"{card}: has no {of}. It has: {', '.join(fields)}. Tar shards have them in json members "
            f"(captions also in txt), Parquet files in a column: see the options of both in "
            f"datasets/README.md. Of a folder a class, make_shards.py folder path=… --class-tags packs the "
            f"names as hashtags."
        )


def _synsets(args: argparse.Namespace, of: str) -> Synsets | None:
    """The rule by which tags are merged; None where each stays its own."""
    if of == "captions":
        return Synsets(Nouns.open(args.synsets or "wordnet"), of=of)
    if args.synsets is None:
        return None
    nouns = Nouns.open(args.synsets)
    return Synsets(nouns, ambiguous=args.ambiguous, unmapped=args.unmapped)


def _show(vocabulary: Vocabulary, top: int) -> None:
    tags = defaultdict(list)
    for tag, label in vocabulary.merged.labels.items() if vocabulary.merged else ():
        tags[label].append(tag)
    names = vocabulary.merged.names if vocabulary.merged else {}
    for label, count in list(zip(vocabulary.tags, vocabulary.counts))[:top]:
        said = f"  {names[label]}: {', '.join(sorted(tags[label]))}" if label in names else ""
        print(f"{count:10d}  {label}{said}")


def _show_rule(synsets: Synsets, vocabulary: Vocabulary, top: int) -> None:
    """How many tags have a synset, and the most frequent of those that have none."""
    rule = vocabulary.merged.rule
    for name in ("seen", "of_several_synsets", "without_synset"):
        if name in rule:
            print(f"{name}: {rule[name]['tags']} tags, {rule[name]['uses']} times")
    kept = synsets.of == "hashtags" and synsets.unmapped == "keep"
    print(
        f"without a synset, {'tags of their own' if kept else 'left out'}: "
        f"{', '.join(synsets.without()[:top]) or 'none'}"
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
