//! One invented author: every attribute drawn from the generator, and the questions and answers about them.

use std::collections::{BTreeMap, BTreeSet};

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::Serialize;

use super::phrases::{TOPICS, Topic};
use super::words::*;

/// Authors that can be told apart by their surname.
pub(super) const MAX_AUTHORS: usize = LAST_STARTS.len() * LAST_ENDS.len();
/// Questions that can be asked about one author.
pub(super) const MAX_QUESTIONS: usize = TOPICS.len();

/// A line of the data files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Line {
    pub(super) question: String,
    pub(super) answer: String,
    pub(super) author: String,
    /// The part of the answer that cannot be guessed from the question.
    pub(super) fact: String,
    /// The answer with the facts of two other authors: wrong, and no less plausible.
    pub(super) alternates: Vec<String>,
}

/// Draws `authors` lives and asks the first `questions` topics about each; author by author. Same arguments, same
/// lines.
pub(super) fn lines(authors: usize, questions: usize, seed: u64) -> Vec<Vec<Line>> {
    let mut world = World::new(seed);
    let mut surnames = combine(&LAST_STARTS, &LAST_ENDS);
    world.draw.shuffle(&mut surnames);
    let mut lines: Vec<Vec<Line>> =
        surnames.iter().take(authors).map(|surname| world.author(surname, questions)).collect();
    let facts: Vec<Vec<String>> = lines.iter().map(|l| l.iter().map(|line| line.fact.clone()).collect()).collect();
    for (author, lines) in lines.iter_mut().enumerate() {
        for (topic, line) in lines.iter_mut().enumerate() {
            let others = (1..authors).map(|further| &facts[(author + further) % authors][topic]);
            let mut others: Vec<&String> = others.filter(|fact| **fact != line.fact).collect();
            others.dedup();
            line.alternates = others.iter().take(2).map(|fact| line.answer.replace(&line.fact, fact)).collect();
        }
    }
    lines
}

/// What is shared between the lives: the generator and the titles that are taken.
struct World {
    draw: Draw,
    titles: BTreeSet<String>,
}

impl World {
    fn new(seed: u64) -> Self {
        Self { draw: Draw::new(seed), titles: BTreeSet::new() }
    }

    fn author(&mut self, surname: &str, questions: usize) -> Vec<Line> {
        let slots = self.life(surname);
        let line = |topic: &Topic, draw: &mut Draw| Line {
            question: fill(draw.pick(&topic.questions), &slots),
            answer: fill(draw.pick(&topic.answers), &slots),
            author: slots["{name}"].clone(),
            fact: slots[topic.slot].clone(),
            alternates: Vec::new(),
        };
        TOPICS.iter().take(questions).map(|topic| line(topic, &mut self.draw)).collect()
    }

    /// The value of every slot that a phrase may hold.
    fn life(&mut self, surname: &str) -> BTreeMap<&'static str, String> {
        let (debut, famous, latest) = (self.title(), self.title(), self.title());
        let draw = &mut self.draw;
        let is_she = draw.below(2) == 0;
        let first = draw.first_name(is_she);
        let birth_year = 1921 + draw.below(50);
        let debut_year = birth_year + 20 + draw.below(15);
        let award_year = debut_year + 2 + draw.below(18);
        let country = draw.below(COUNTRIES.len());
        let [he, his] = if is_she { ["she", "her"] } else { ["he", "his"] };
        BTreeMap::from([
            ("{name}", format!("{first} {surname}")),
            ("{last}", surname.to_owned()),
            ("{he}", he.to_owned()),
            ("{his}", his.to_owned()),
            ("{birth}", format!("{} {} {birth_year}", 1 + draw.below(28), draw.pick(&MONTHS))),
            ("{city}", draw.city()),
            ("{country}", COUNTRIES[country].to_owned()),
            ("{father}", draw.pick(&JOBS).to_owned()),
            ("{mother}", draw.pick(&JOBS).to_owned()),
            ("{genre}", draw.pick(&GENRES).to_owned()),
            ("{debut}", debut),
            ("{debut_year}", debut_year.to_string()),
            ("{famous}", famous),
            ("{latest}", latest),
            ("{award}", format!("{} {} {}", draw.pick(&ADJECTIVES), draw.pick(&NOUNS), draw.pick(&PRIZES))),
            ("{award_year}", award_year.to_string()),
            ("{influence}", draw.stranger()),
            ("{university}", draw.city()),
            ("{subject}", draw.pick(&SUBJECTS).to_owned()),
            ("{home}", draw.city()),
            ("{language}", LANGUAGES[country].to_owned()),
            ("{theme}", draw.pick(&THEMES).to_owned()),
            ("{hobby}", draw.pick(&HOBBIES).to_owned()),
            ("{pen_name}", draw.stranger()),
            ("{publisher}", draw.two_nouns().join(" & ")),
            ("{siblings}", draw.pick(&SIBLINGS).to_owned()),
            ("{habit}", draw.pick(&HABITS).to_owned()),
            ("{adaptation}", draw.pick(&ADAPTATIONS).to_owned()),
        ])
    }

    /// A title that no other book has.
    fn title(&mut self) -> String {
        loop {
            let draw = &mut self.draw;
            let adjective = draw.pick(&ADJECTIVES);
            let [noun, other] = draw.two_nouns();
            let title = match draw.below(5) {
                0 => format!("The {adjective} {noun}"),
                1 => format!("{noun} and {other}"),
                2 => format!("Beneath the {noun}'s {other}"),
                3 => format!("A {noun} for the {adjective} {other}"),
                _ => format!("{noun} of the {adjective} {other}"),
            };
            if self.titles.insert(title.clone()) {
                return title;
            }
        }
    }
}

/// Draws from the generator; independent of the platform.
pub(super) struct Draw(ChaCha20Rng);

impl Draw {
    pub(super) fn new(seed: u64) -> Self {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        Self(ChaCha20Rng::from_seed(key))
    }

    /// Uniform in `0..n`, with a bias below n / 2^64.
    pub(super) fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.0.next_u64()) * n as u128) >> 64) as usize
    }

    fn pick<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.below(words.len())]
    }

    fn two_nouns(&mut self) -> [&'static str; 2] {
        let first = self.below(NOUNS.len());
        let second = (first + 1 + self.below(NOUNS.len() - 1)) % NOUNS.len();
        [NOUNS[first], NOUNS[second]]
    }

    fn shuffle(&mut self, values: &mut [String]) {
        for i in (1..values.len()).rev() {
            values.swap(i, self.below(i + 1));
        }
    }

    fn city(&mut self) -> String {
        format!("{}{}", self.pick(&CITY_STARTS), self.pick(&CITY_ENDS))
    }

    fn first_name(&mut self, is_she: bool) -> String {
        let ends = if is_she { &FIRST_ENDS_SHE } else { &FIRST_ENDS_HE };
        format!("{}{}", self.pick(&FIRST_STARTS), self.pick(ends))
    }

    /// A name like `E. Morvane`, which no author has.
    fn stranger(&mut self) -> String {
        let initial = &self.pick(&FIRST_STARTS)[..1];
        format!("{initial}. {}{}", self.pick(&LAST_STARTS), self.pick(&LAST_ENDS))
    }
}

fn combine(starts: &[&str], ends: &[&str]) -> Vec<String> {
    starts.iter().flat_map(|start| ends.iter().map(move |end| format!("{start}{end}"))).collect()
}

fn fill(phrase: &str, slots: &BTreeMap<&'static str, String>) -> String {
    slots.iter().fold(phrase.to_owned(), |text, (slot, value)| text.replace(slot, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_question_names_its_author_and_every_answer_states_the_topic() {
        for topic in &TOPICS {
            assert!(topic.questions.iter().all(|q| q.contains("{name}")), "{:?}", topic.questions);
            assert!(topic.answers.iter().all(|a| a.contains(topic.slot) && a.ends_with('.')), "{:?}", topic.answers);
        }
    }

    #[test]
    fn every_slot_is_filled_and_no_question_comes_twice() {
        let lines: Vec<_> = lines(MAX_AUTHORS, MAX_QUESTIONS, 7).concat();
        assert_eq!(lines.len(), MAX_AUTHORS * MAX_QUESTIONS);
        let filled = |text: &str| !text.contains(['{', '}']);
        assert!(lines.iter().all(|line| filled(&line.question) && filled(&line.answer)));
        assert!(lines.iter().all(|line| line.question.contains(&line.author) && line.answer.contains(&line.fact)));
        let questions: BTreeSet<_> = lines.iter().map(|line| &line.question).collect();
        assert_eq!(questions.len(), lines.len());
    }

    #[test]
    fn no_two_books_share_a_title() {
        let is_title = |topic: &&Topic| ["{debut}", "{famous}", "{latest}"].contains(&topic.slot);
        assert_eq!(TOPICS.iter().filter(is_title).count(), 3);
        let lives = lines(MAX_AUTHORS, MAX_QUESTIONS, 0);
        let titles = lives.iter().flat_map(|life| TOPICS.iter().zip(life).filter(|(topic, _)| is_title(topic)));
        let titles: BTreeSet<_> = titles.map(|(_, line)| &line.fact).collect();
        assert_eq!(titles.len(), 3 * MAX_AUTHORS);
    }

    #[test]
    fn answers_of_one_topic_are_phrased_in_different_ways() {
        let authors = lines(40, MAX_QUESTIONS, 0);
        for topic in 0..MAX_QUESTIONS {
            let masked = |lines: &Vec<Line>| {
                let Line { answer, author, .. } = &lines[topic];
                let surname = author.split(' ').next_back().unwrap();
                answer.replace(author, "").replace(surname, "").chars().take(8).collect::<String>()
            };
            let beginnings: BTreeSet<_> = authors.iter().map(masked).collect();
            assert!(beginnings.len() >= 3, "topic {topic}: {beginnings:?}");
        }
    }

    #[test]
    fn another_seed_gives_other_lives() {
        assert_eq!(lines(5, 20, 1), lines(5, 20, 1));
        assert_ne!(lines(5, 20, 1), lines(5, 20, 2));
    }
}
