//! The Porter stemmer in NLTK's variant, which `rouge-score` uses: Porter's algorithm with the changes of NLTK's contributors.
//!
//! The crates at hand have Porter's original or his later English stemmer; both differ from NLTK in a few words of a hundred.

/// Suffix, replacement, and the least measure of what remains for the rule to apply. The first suffix that fits decides.
type Rule = (&'static str, &'static str, usize);

const IRREGULAR: [(&str, &str); 16] = [
    ("sky", "sky"),
    ("skies", "sky"),
    ("dying", "die"),
    ("lying", "lie"),
    ("tying", "tie"),
    ("news", "news"),
    ("innings", "inning"),
    ("inning", "inning"),
    ("outings", "outing"),
    ("outing", "outing"),
    ("cannings", "canning"),
    ("canning", "canning"),
    ("howe", "howe"),
    ("proceed", "proceed"),
    ("exceed", "exceed"),
    ("succeed", "succeed"),
];

const PLURALS: [Rule; 4] = [("sses", "ss", 0), ("ies", "i", 0), ("ss", "ss", 0), ("s", "", 0)];

const DOUBLE_SUFFIXES: [Rule; 21] = [
    ("ational", "ate", 1),
    ("tional", "tion", 1),
    ("enci", "ence", 1),
    ("anci", "ance", 1),
    ("izer", "ize", 1),
    ("bli", "ble", 1),
    ("alli", "al", 1),
    ("entli", "ent", 1),
    ("eli", "e", 1),
    ("ousli", "ous", 1),
    ("ization", "ize", 1),
    ("ation", "ate", 1),
    ("ator", "ate", 1),
    ("alism", "al", 1),
    ("iveness", "ive", 1),
    ("fulness", "ful", 1),
    ("ousness", "ous", 1),
    ("aliti", "al", 1),
    ("iviti", "ive", 1),
    ("biliti", "ble", 1),
    ("fulli", "ful", 1),
];

const SINGLE_SUFFIXES: [Rule; 7] = [
    ("icate", "ic", 1),
    ("ative", "", 1),
    ("alize", "al", 1),
    ("iciti", "ic", 1),
    ("ical", "ic", 1),
    ("ful", "", 1),
    ("ness", "", 1),
];

/// Without "ion", which stands before "ou" and asks for an s or t besides.
const ENDINGS: [Rule; 19] = [
    ("al", "", 2),
    ("ance", "", 2),
    ("ence", "", 2),
    ("er", "", 2),
    ("ic", "", 2),
    ("able", "", 2),
    ("ible", "", 2),
    ("ant", "", 2),
    ("ement", "", 2),
    ("ment", "", 2),
    ("ent", "", 2),
    ("ion", "", 2),
    ("ou", "", 2),
    ("ism", "", 2),
    ("ate", "", 2),
    ("iti", "", 2),
    ("ous", "", 2),
    ("ive", "", 2),
    ("ize", "", 2),
];

/// The stem of a lower-case word of ASCII letters and digits.
///
/// # Panics
/// Other characters.
pub fn stem(word: &str) -> String {
    assert!(word.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()), "invariant: a lower-case ASCII word");
    if let Some((_, stem)) = IRREGULAR.iter().find(|(irregular, _)| *irregular == word) {
        return (*stem).to_owned();
    }
    if word.len() <= 2 {
        return word.to_owned();
    }
    let word = plural(word.to_owned());
    let word = past_and_gerund(word);
    let word = final_y(word);
    let word = double_suffix(word);
    let word = apply(&word, &SINGLE_SUFFIXES).unwrap_or(word);
    let word = ending(word);
    final_l(final_e(word))
}

/// Step 1a; NLTK keeps the e of four-letter words ("dies").
fn plural(word: String) -> String {
    if word.len() == 4 && word.ends_with("ies") {
        return word[..3].to_owned();
    }
    apply(&word, &PLURALS).unwrap_or(word)
}

/// Step 1b; NLTK: "died" to "die", longer ones in "ied" to "i".
fn past_and_gerund(word: String) -> String {
    if word.ends_with("ied") {
        return word[..word.len() - if word.len() == 4 { 1 } else { 2 }].to_owned();
    }
    if let Some(rest) = word.strip_suffix("eed") {
        return if measure(rest) > 0 { format!("{rest}ee") } else { word };
    }
    let Some(rest) = ["ed", "ing"].iter().find_map(|s| word.strip_suffix(s).filter(|rest| has_vowel(rest))) else {
        return word;
    };
    if ["at", "bl", "iz"].iter().any(|end| rest.ends_with(end)) {
        return format!("{rest}e");
    }
    if let [.., before, last] = rest.as_bytes()
        && before == last
        && ends_in_consonant(rest)
    {
        return if b"lsz".contains(last) { rest.to_owned() } else { rest[..rest.len() - 1].to_owned() };
    }
    if measure(rest) == 1 && ends_short(rest) { format!("{rest}e") } else { rest.to_owned() }
}

/// Step 1c in NLTK's form: behind a consonant that is not the whole stem ("enjoy" stays).
fn final_y(word: String) -> String {
    match word.strip_suffix('y') {
        Some(rest) if rest.len() > 1 && ends_in_consonant(rest) => format!("{rest}i"),
        _ => word,
    }
}

/// Step 2; NLTK takes "alli" first and goes on with what remains, and lets the l of "logi" count for the stem.
fn double_suffix(word: String) -> String {
    if let Some(rest) = word.strip_suffix("alli")
        && measure(rest) > 0
    {
        return double_suffix(format!("{rest}al"));
    }
    if let Some(word) = apply(&word, &DOUBLE_SUFFIXES) {
        return word;
    }
    match word.strip_suffix("ogi") {
        Some(rest) if rest.ends_with('l') && measure(rest) > 0 => format!("{rest}og"),
        _ => word,
    }
}

/// Step 4.
fn ending(word: String) -> String {
    match word.strip_suffix("ion") {
        Some(rest) if measure(rest) > 1 && !rest.ends_with(['s', 't']) => word,
        _ => apply(&word, &ENDINGS).unwrap_or(word),
    }
}

/// Step 5a.
fn final_e(word: String) -> String {
    match word.strip_suffix('e') {
        Some(rest) if measure(rest) > 1 || measure(rest) == 1 && !ends_short(rest) => rest.to_owned(),
        _ => word,
    }
}

/// Step 5b.
fn final_l(word: String) -> String {
    match word.strip_suffix('l') {
        Some(rest) if rest.ends_with('l') && measure(rest) > 1 => rest.to_owned(),
        _ => word,
    }
}

/// The word by the first rule whose suffix it has; the word itself if that rule does not apply; None if none has.
fn apply(word: &str, rules: &[Rule]) -> Option<String> {
    rules.iter().find_map(|(suffix, replacement, least)| {
        let rest = word.strip_suffix(suffix)?;
        Some(if measure(rest) >= *least { format!("{rest}{replacement}") } else { word.to_owned() })
    })
}

/// Which letters are consonants: all but vowels, digits too; a y where the letter before it is none.
fn consonants(word: &str) -> Vec<bool> {
    let mut flags: Vec<bool> = Vec::with_capacity(word.len());
    for byte in word.bytes() {
        flags.push(match byte {
            b'a' | b'e' | b'i' | b'o' | b'u' => false,
            b'y' => flags.last().is_none_or(|before| !before),
            _ => true,
        });
    }
    flags
}

/// Porter's m: how often a consonant follows a vowel.
fn measure(word: &str) -> usize {
    consonants(word).windows(2).filter(|pair| !pair[0] && pair[1]).count()
}

fn has_vowel(word: &str) -> bool {
    consonants(word).contains(&false)
}

fn ends_in_consonant(word: &str) -> bool {
    consonants(word).last() == Some(&true)
}

/// Porter's *o: consonant, vowel, consonant other than w, x, y; NLTK: two letters, a vowel and a consonant, as well.
fn ends_short(word: &str) -> bool {
    let flags = consonants(word);
    match flags.as_slice() {
        [false, true] => true,
        [.., true, false, true] => !word.ends_with(['w', 'x', 'y']),
        _ => false,
    }
}
