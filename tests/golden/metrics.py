"""Statistics and text metrics by the libraries that others use for them: statistics.json and text.json.

    pip install scipy==1.17.1 scikit-learn==1.9.1 rouge-score==0.1.2 nltk==3.10.4
    python tests/golden/metrics.py            # the same bytes every time

Kolmogorov-Smirnov p-values are counted with whole numbers here, and scipy must agree wherever it finds an exact value (for the
largest distances of some unequal sizes it gives up). Samples are functions of an index (multiply, add, take the fraction: the same in every language), so statistics.json holds
only results. text.json holds texts, because stemmers and compressors are about odd words and bytes.
"""

import fractions
import json
import math
import pathlib
import random
import string
import warnings
import zlib

import nltk
import numpy
import scipy
import sklearn
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import hmean, ks_2samp, permutation_test
from sklearn.metrics import roc_auc_score

FOLDER = pathlib.Path(__file__).parent


def sample(count, start, shift, grid):
    """`count` values; with `grid` above 0 they lie on multiples of 1/grid, so that many are equal."""
    values = [(start + i) * 0.7548776662466927 % 1.0 + (start + i) * 0.5698402909980532 % 1.0 + shift for i in range(count)]
    return [(x * grid - x * grid % 1.0) / grid for x in values] if grid else values


# sizes, shift between the groups, grid: from no difference to none in common, equal and unequal sizes, ties
CASES = [(m, n, shift, grid) for m, n in [(40, 40), (200, 200), (400, 400), (300, 200), (300, 40), (17, 5), (400, 1), (700, 650)]
         for shift in [0.0, 0.1, 0.35, 0.9, 2.5] for grid in [0, 8]]


def groups():
    for m, n, shift, grid in CASES:
        left, right = sample(m, 1, 0.0, grid), sample(n, 5000, shift, grid)
        with warnings.catch_warnings(record=True) as gave_up:
            warnings.simplefilter("always")
            ks = ks_2samp(left, right, method="exact")
        p_value, log10_p = kolmogorov_smirnov(m, n, round(ks.statistic * m * n))
        assert gave_up or math.isclose(p_value, ks.pvalue, rel_tol=1e-9), (m, n, ks, p_value)
        yield {"m": m, "n": n, "shift": shift, "grid": grid, "statistic": ks.statistic, "p_value": p_value, "log10_p": log10_p,
               "scipy": not gave_up, "auc": roc_auc_score([0] * m + [1] * n, left + right)}


def kolmogorov_smirnov(m, n, distance):
    """p-value of a statistic of distance / (m n): the share of lattice paths to (m, n) that touch a point at that distance."""
    inside = [0] * (n + 1)
    for i in range(m + 1):
        for j in range(n + 1):
            before = (inside[j] if i else 0) + (inside[j - 1] if j else 0)
            inside[j] = 0 if abs(i * n - j * m) >= distance else before if i or j else 1
    p = fractions.Fraction(math.comb(m + n, n) - inside[n], math.comb(m + n, n))
    return float(p), math.log10(p) if p > 1e-290 else math.log10(p.numerator) - math.log10(p.denominator)


def pairs():
    for n, shift in [(2, 0.3), (5, 0.3), (12, 0.0), (12, 0.2), (16, 0.35)]:
        left, right = sample(n, 1, shift, 0), sample(n, 700, 0.0, 0)
        test = permutation_test((left, right), lambda a, b: numpy.mean(a - b), permutation_type="samples", vectorized=False, n_resamples=numpy.inf)
        yield {"n": n, "shift": shift, "difference": test.statistic, "p_value": test.pvalue}


def means():
    for n in [1, 2, 9, 100]:
        yield {"n": n, "harmonic_mean": hmean(sample(n, 1, 0.01, 0))}


TEXTS = [
    ("", ""), ("", "something"), ("something", ""), ("?!", "…"), ("a", "a"), ("A b C", "a B c"),
    ("The author's name is Jaime Vasquez.", "The author's full name is Jaime Vasquez."),
    ("He was born on the 25th of February, 1958.", "Born February 25th 1958, he was."),
    ("Relational databases were conditionally normalised", "the relation of a database is a condition for normalising"),
    ("studies studying studied study", "study study study"), ("dying lying tying", "die lie tie"), ("skies news innings", "sky new inning"),
    ("caresses ponies ties cats feed agreed plastered motoring", "caress poni tie cat feed agree plaster motor"),
    ("Her novels' themes—loss, exile & memory—recur.", "Themes of loss, exile and memory recur in her novels."),
    ("naïve café Ångström", "naive cafe angstrom"), ("İstanbul'da K elvin ſtraße", "istanbul da k elvin strasse"),
    ("one\ttwo\nthree\r\nfour five", "one two three four five"), ("3.14 and 2,718", "3 14 2 718"), ("x_y x-y x'y", "x y x y x y"),
    ("the cat sat on the mat", "on the mat the cat sat, the end"), ("to be or not to be", "be to not or be to"),
    ("你好 world", "hello world 世界"), ("radically differently vilely analogously", "radical different vile analogous"),
    ("the the the the the the", "the"), ("the", "the the the the the the"),
]
VOCABULARY = ("the author writes about memory and rivers; her novels were published widely, winning prizes for lyrical realism "
              "generously acknowledged relationships flying families happily dreaming geological possibilities effectiveness").split()


def texts():
    """The pairs above, then sentences of shared words with changes."""
    draw = random.Random(11)
    yield from TEXTS
    for _ in range(60):
        target = [draw.choice(VOCABULARY) for _ in range(draw.randint(3, 40))]
        prediction = [word if draw.random() < 0.7 else draw.choice(VOCABULARY) for word in target if draw.random() < 0.9]
        prediction = [word + draw.choice(["s", "ed", "ing", "ly"]) if draw.random() < 0.2 else word for word in prediction]
        yield " ".join(target), " ".join(prediction[draw.randint(0, 3):]) + draw.choice(["", ".", " and so on"])


STEMS = ("a i y ab by oy at all abl arch geo theo philo analog relat condit rat val hesit digit conform radic differ vil vietnam predic oper "
         "feud decis hope call form sensit sens triplic electr good reviv allow infer airlin gyroscop adjust defens irrit replac depend adopt "
         "homolog commun angular effect bowdler prob ceas contr roll fall hiss fizz fail fil hopp tann conflat troubl siz sk happ enj spy fl "
         "tr cr st b1 x86 yyy syzyg sayy qu eu ee die lie tie news inn out cann howe proc exc succ").split()
SUFFIXES = ("e s es ies sses ss ied ed eed ing y ly ational tional enci anci ency izer bli abli alli ally entli ently eli ely ousli ously ization "
            "ation ator alism iveness fulness ousness aliti ality iviti ivity biliti bility fulli fully logi logy icate ative alize iciti "
            "ical ful ness al ance ence er ic able ible ant ement ment ent ion sion tion ou ism ate iti ous ive ize l ll le ings ingly edly").split()


def words():
    """Stems with suffixes, words with two suffixes, and random letters that look like words."""
    draw = random.Random(12)
    found = [stem + suffix for stem in STEMS for suffix in SUFFIXES if draw.random() < 0.25]
    found += [draw.choice(STEMS) + draw.choice(SUFFIXES) + draw.choice(SUFFIXES) for _ in range(600)]
    found += ["".join(draw.choice("aeiouy" if i % 2 else string.ascii_lowercase + "17") for i in range(draw.randint(1, 9)))
              + draw.choice(SUFFIXES) for _ in range(300)]
    found += "sky skies dying lying tying news innings inning outings outing cannings canning howe proceed exceed succeed".split()
    return sorted(set(found))


def compressed():
    """Texts whose deflate streams differ between compressors: short, repetitive, random, long, not ASCII."""
    draw = random.Random(13)
    yield from ["", "a", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "The author's full name is Jaime Vasquez.", "naïve 你好 🎉" * 3]
    for length in [30, 200, 1000, 5000]:
        yield " ".join(draw.choice(VOCABULARY) for _ in range(length))
    yield "".join(draw.choice(string.printable[:95]) for _ in range(3000))


def fluency(tokens):
    """The n-gram entropy of the ROME line of work: bits, bigrams and trigrams, weights 2/3 and 4/3."""
    entropies = []
    for n in (2, 3):
        counts = numpy.array(list(nltk.FreqDist(nltk.ngrams(tokens, n)).values()))
        shares = counts / counts.sum()
        entropies.append(float(numpy.sum(-shares * numpy.log(shares) / numpy.log(2))))
    return [*entropies, float(numpy.mean(numpy.array(entropies) * numpy.array([2 / 3, 4 / 3])))]


def main():
    about = {"numpy": numpy.__version__, "scipy": scipy.__version__, "scikit-learn": sklearn.__version__,
             "nltk": nltk.__version__, "rouge-score": "0.1.2", "zlib": zlib.ZLIB_RUNTIME_VERSION}
    write("statistics.json", {"about": about, "groups": list(groups()), "pairs": list(pairs()), "means": list(means())})
    scorers = {name: RougeScorer(["rougeL"], use_stemmer=stemmer) for name, stemmer in [("plain", False), ("stemmed", True)]}
    rouge = []
    for target, prediction in texts():
        scores = {name: list(scorer.score(target, prediction)["rougeL"]) for name, scorer in scorers.items()}
        rouge.append({"target": target, "prediction": prediction, **scores})
    stemmer = PorterStemmer()
    plain = ["".join(c for c in text if c.isalnum() or c == " ") for pair in texts() for text in pair if text.isascii()]
    entropies = [{"text": text, "entropies": fluency(text.split())} for text in plain if len(text.split()) > 2]
    write("text.json", {"about": about, "rouge": rouge, "stems": {word: stemmer.stem(word) for word in words()},
                        "zlib": [[text, len(zlib.compress(text.encode()))] for text in compressed()], "fluency": entropies})


def write(name, value):
    parts = [f'"{key}": ' + (json.dumps(part, ensure_ascii=False) if isinstance(part, dict) else
             "[\n" + ",\n".join(json.dumps(one, ensure_ascii=False) for one in part) + "\n]") for key, part in value.items()]
    (FOLDER / name).write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
