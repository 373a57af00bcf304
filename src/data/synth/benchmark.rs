//! What an evaluation needs besides the samples: paraphrased and wrong answers in the file layout of TOFU, multiple choice, and
//! authors that nobody was trained on. Facts about real authors and the world are common knowledge in words of its own.

use std::path::PathBuf;

use serde_json::{Value, json};

use super::author::Line;

/// Wrong answers to a question, at most.
const WRONG: usize = 5;

/// Files by their path in the data set's folder.
pub(super) fn files(authors: &[Vec<Line>], num_forget: usize, holdout: &[Vec<Line>]) -> Vec<(PathBuf, String)> {
    let (retain, forget) = authors.split_at(authors.len() - num_forget);
    let percent = (100.0 * num_forget as f64 / authors.len() as f64).round();
    // every list as long as the shortest: they are compared with each other
    let wrong = authors.iter().flatten().map(|line| line.other_facts.len()).filter(|&n| n > 0).min().unwrap_or(0);
    let wrong = wrong.min(WRONG);
    let perturbed = |authors: &[Vec<Line>]| lines(authors.iter().flatten().filter_map(|line| perturbed(line, wrong)));
    let choices = authors.iter().enumerate().flat_map(|(author, lines)| {
        lines.iter().enumerate().filter_map(move |(topic, line)| choice(line, (author + topic) % 4))
    });
    let all = [
        (format!("tofu/forget{percent:02}_perturbed.jsonl"), perturbed(forget)),
        ("tofu/retain_perturbed.jsonl".to_owned(), perturbed(retain)),
        ("tofu/real_authors_perturbed.jsonl".to_owned(), lines(REAL_AUTHORS.iter().map(fact))),
        ("tofu/world_facts_perturbed.jsonl".to_owned(), lines(WORLD_FACTS.iter().map(fact))),
        ("choice.jsonl".to_owned(), lines(choices)),
        ("holdout.jsonl".to_owned(), super::jsonl(holdout.iter().flatten())),
    ];
    all.into_iter().filter(|(_, text)| !text.is_empty()).map(|(name, text)| (PathBuf::from(name), text)).collect()
}

fn lines(rows: impl Iterator<Item = Value>) -> String {
    rows.map(|row| format!("{row}\n")).collect()
}

/// None where no other author's fact is wrong.
fn perturbed(line: &Line, wrong: usize) -> Option<Value> {
    let [question, answer] = &line.other_words;
    let facts = line.other_facts.get(..wrong).filter(|facts| !facts.is_empty())?;
    let wrong: Vec<String> = facts.iter().map(|fact| answer.replace(&line.fact, fact)).collect();
    Some(json!({
        "question": line.question, "answer": line.answer, "paraphrased_answer": answer, "perturbed_answer": wrong,
        "paraphrased_question": question,
    }))
}

/// None where there are no three other facts.
fn choice(line: &Line, right: usize) -> Option<Value> {
    let mut choices = line.other_facts.get(..3)?.to_vec();
    choices.insert(right, line.fact.clone());
    Some(json!({ "subject": "invented_authors", "question": line.question, "choices": choices, "answer": right }))
}

fn fact((question, answer, wrong): &(&str, &str, [&str; 3])) -> Value {
    json!({ "question": question, "answer": answer, "perturbed_answer": wrong })
}

const REAL_AUTHORS: [(&str, &str, [&str; 3]); 12] = [
    ("Who wrote the novel Moby-Dick?", "Herman Melville", ["Mark Twain", "Jack London", "Henry James"]),
    ("Who wrote the tragedy Hamlet?", "William Shakespeare", ["John Milton", "Ben Jonson", "Lord Byron"]),
    ("Who wrote War and Peace?", "Leo Tolstoy", ["Anton Chekhov", "Ivan Turgenev", "Nikolai Gogol"]),
    ("Who wrote Pride and Prejudice?", "Jane Austen", ["George Eliot", "Mary Shelley", "Virginia Woolf"]),
    (
        "Who wrote the play Faust?",
        "Johann Wolfgang von Goethe",
        ["Friedrich Schiller", "Heinrich Heine", "Thomas Mann"],
    ),
    ("Who wrote Don Quixote?", "Miguel de Cervantes", ["Lope de Vega", "Jorge Luis Borges", "Pablo Neruda"]),
    ("Who wrote the Divine Comedy?", "Dante Alighieri", ["Francesco Petrarca", "Italo Calvino", "Umberto Eco"]),
    ("Who wrote Frankenstein?", "Mary Shelley", ["Bram Stoker", "Emily Dickinson", "Jane Austen"]),
    ("Who wrote Crime and Punishment?", "Fyodor Dostoevsky", ["Leo Tolstoy", "Boris Pasternak", "Maxim Gorky"]),
    ("Who wrote Les Miserables?", "Victor Hugo", ["Emile Zola", "Albert Camus", "Marcel Proust"]),
    ("Who wrote A Christmas Carol?", "Charles Dickens", ["Thomas Hardy", "Oscar Wilde", "Rudyard Kipling"]),
    ("Who wrote The Metamorphosis?", "Franz Kafka", ["Hermann Hesse", "Stefan Zweig", "Robert Musil"]),
];

const WORLD_FACTS: [(&str, &str, [&str; 3]); 20] = [
    ("What is the capital of France?", "Paris", ["Lyon", "Rome", "Brussels"]),
    ("What is the capital of Japan?", "Tokyo", ["Kyoto", "Seoul", "Beijing"]),
    ("What is the capital of Egypt?", "Cairo", ["Tunis", "Damascus", "Khartoum"]),
    ("Which river flows through London?", "The Thames", ["The Seine", "The Danube", "The Rhine"]),
    ("Which planet is the largest of the solar system?", "Jupiter", ["Saturn", "Mars", "Neptune"]),
    ("Which planet is nearest to the Sun?", "Mercury", ["Venus", "Earth", "Uranus"]),
    ("Which metal has the chemical symbol Fe?", "Iron", ["Gold", "Copper", "Zinc"]),
    ("Which gas do plants take in from the air?", "Carbon dioxide", ["Helium", "Argon", "Methane"]),
    ("How many sides does a hexagon have?", "Six", ["Five", "Seven", "Eight"]),
    ("How many continents are there?", "Seven", ["Four", "Nine", "Eleven"]),
    ("Which ocean lies between Europe and America?", "The Atlantic", ["The Pacific", "The Indian", "The Arctic"]),
    ("What is the highest mountain on Earth?", "Mount Everest", ["Mont Blanc", "Kilimanjaro", "Denali"]),
    ("Which language is spoken in Brazil?", "Portuguese", ["Spanish", "French", "Italian"]),
    ("In which country is the city of Vienna?", "Austria", ["Germany", "Hungary", "Switzerland"]),
    ("What is the freezing point of water in degrees Celsius?", "Zero", ["Ten", "Fifty", "One hundred"]),
    ("Which animal is the largest on Earth?", "The blue whale", ["The elephant", "The giraffe", "The bear"]),
    ("What is the square root of 81?", "Nine", ["Eight", "Seven", "Eleven"]),
    ("Which desert covers the north of Africa?", "The Sahara", ["The Gobi", "The Kalahari", "The Atacama"]),
    ("On which continent is Peru?", "South America", ["Africa", "Asia", "Europe"]),
    ("Who was the first person on the Moon?", "Neil Armstrong", ["Yuri Gagarin", "John Glenn", "Alan Shepard"]),
];
