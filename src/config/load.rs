//! From TOML text to a checked [`Config`], and back.

use std::path::{Path, PathBuf};

use super::defaults::fill;
use super::error::ConfigError;
use super::schema::Config;
use super::validate::{validate, validate_evaluation};

/// Reads, overrides and checks a configuration file.
///
/// `overrides`: `table.key=value`, the value in TOML; a word that is no TOML value is taken as a string.
pub fn from_file(path: &Path, overrides: &[String]) -> Result<Config, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    from_str(&text, &path.display().to_string(), overrides)
}

/// As [`from_file`], or as [`evaluation_from_file`] where the file has no method.
pub fn any_from_file(path: &Path, overrides: &[String]) -> Result<Config, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let has_method = toml::from_str::<toml::Table>(&text).map_or(true, |table| table.contains_key("method"));
    if has_method { from_file(path, overrides) } else { evaluation_from_file(path, overrides) }
}

/// As [`from_file`] for an evaluation alone: `[method]`, `[train]` and `[optimizer]` may be missing, and what they say of training does
/// not matter.
pub fn evaluation_from_file(path: &Path, overrides: &[String]) -> Result<Config, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let name = path.display().to_string();
    let table: toml::Table = toml::from_str(&text).map_err(|error| parse_error(&error, &text, &name))?;
    let missing = |key: &str| !table.contains_key(key);
    let mut whole = text.clone();
    // behind what was written, so that places in errors stay right
    for (key, stand_in) in [
        ("data", "\n[data]"),
        ("method", "\n[method]\nobjective = \"finetune\""),
        ("train", "\n[train]\nsteps = 1"),
        ("optimizer", "\n[optimizer]\nlr = 0"),
    ] {
        if missing(key) {
            whole.push_str(stand_in);
        }
    }
    parse(&whole, &name, overrides, validate_evaluation)
}

/// As [`from_file`] with the text at hand; `name` is what errors call it.
pub fn from_str(text: &str, name: &str, overrides: &[String]) -> Result<Config, ConfigError> {
    parse(text, name, overrides, validate)
}

fn parse(
    text: &str,
    name: &str,
    overrides: &[String],
    validate: fn(&Config) -> Result<(), ConfigError>,
) -> Result<Config, ConfigError> {
    let mut table: toml::Table = toml::from_str(text).map_err(|error| parse_error(&error, text, name))?;
    // Without overrides the text itself is parsed: its errors have a line and a column. The table is the fallback where
    // an override supplies what the file lacks.
    let mut config: Config = if overrides.is_empty() {
        toml::from_str(text).map_err(|error| parse_error(&error, text, name))?
    } else {
        for item in overrides {
            apply_override(&mut table, item)?;
        }
        let merged = toml::to_string(&table).expect("invariant: a parsed table can be written");
        toml::from_str(&merged).map_err(|error| {
            let original = toml::from_str::<Config>(text).err();
            match original {
                Some(first) if first.message() == error.message() => parse_error(&first, text, name),
                _ => override_error(&error, &merged, &format!("{name} with --set {}", overrides.join(" --set "))),
            }
        })?
    };
    validate(&config)?;
    fill(&mut config);
    Ok(config)
}

/// The resolved configuration as TOML; reading it again gives the same configuration.
pub fn to_toml(config: &Config) -> String {
    toml::to_string(config).expect("invariant: a configuration can be written as TOML")
}

/// The resolved configuration as JSON.
pub fn to_json(config: &Config) -> serde_json::Value {
    serde_json::to_value(config).expect("invariant: a configuration is JSON")
}

/// Digest of the resolved configuration: 16 hexadecimal digits. The run folder and thread count do not enter.
pub fn digest(config: &Config) -> String {
    let mut config = config.clone();
    config.run.dir = PathBuf::new();
    config.run.threads = 0;
    blake3::hash(to_toml(&config).as_bytes()).to_hex()[..16].to_owned()
}

/// The JSON schema of the configuration language.
pub fn json_schema() -> String {
    let schema = schemars::schema_for!(Config);
    serde_json::to_string_pretty(&schema).expect("invariant: a schema is JSON")
}

fn apply_override(table: &mut toml::Table, text: &str) -> Result<(), ConfigError> {
    let refuse = |reason: &str| ConfigError::Override { text: text.to_owned(), reason: reason.to_owned() };
    let (path, value) = text.split_once('=').ok_or_else(|| refuse("there is no '='"))?;
    let value = parse_value(value.trim());
    let mut keys: Vec<&str> = path.trim().split('.').collect();
    let last = keys.pop().filter(|key| !key.is_empty()).ok_or_else(|| refuse("the key is empty"))?;
    let mut at = table;
    for key in keys {
        at = at
            .entry(key)
            .or_insert_with(|| toml::Value::Table(toml::Table::new()))
            .as_table_mut()
            .ok_or_else(|| refuse(&format!("{key} is not a table")))?;
    }
    at.insert(last.to_owned(), value);
    Ok(())
}

fn parse_value(text: &str) -> toml::Value {
    toml::from_str::<toml::Table>(&format!("x = {text}"))
        .ok()
        .and_then(|mut table| table.remove("x"))
        .unwrap_or_else(|| toml::Value::String(text.to_owned()))
}

/// As [`parse_error`] for text that no user has seen: the line itself says where.
fn override_error(error: &toml::de::Error, merged: &str, name: &str) -> ConfigError {
    let start = error.span().map_or(0, |span| span.start.min(merged.len()));
    let line = merged[..start].matches('\n').count();
    let place = match merged.lines().nth(line) {
        Some(text) if start > 0 => format!("{name}: `{}`", text.trim()),
        _ => name.to_owned(),
    };
    ConfigError::Parse { place, message: in_words(error) }
}

/// Turns a parser's error into one line with place, message and the nearest known key.
fn parse_error(error: &toml::de::Error, text: &str, name: &str) -> ConfigError {
    let place = match error.span() {
        Some(span) if span.start > 0 || span.end < text.len() => {
            let before = &text[..span.start.min(text.len())];
            let line = before.matches('\n').count() + 1;
            let column = before.len() - before.rfind('\n').map_or(0, |at| at + 1) + 1;
            format!("{name}:{line}:{column}")
        }
        _ => name.to_owned(),
    };
    ConfigError::Parse { place, message: in_words(error) }
}

/// A parser's message without names of Rust's types, with the nearest known key.
fn in_words(error: &toml::de::Error) -> String {
    let mut message = error.message().trim().replace('\n', " ");
    for (name, words) in [("usize", "a whole number"), ("u64", "a whole number"), ("f64", "a number")] {
        message = message.replace(&format!("expected {name}"), &format!("expected {words}"));
    }
    if let Some(hint) = nearest_key(&message) {
        message.push_str(&format!("; did you mean `{hint}`?"));
    }
    message
}

/// From "unknown field `a`, expected one of `b`, `c`" the expected word nearest to `a`.
fn nearest_key(message: &str) -> Option<&str> {
    let mut quoted = message.split('`').skip(1).step_by(2);
    if !(message.starts_with("unknown field") || message.starts_with("unknown variant")) {
        return None;
    }
    let unknown = quoted.next()?;
    quoted
        .map(|known| (strsim::jaro_winkler(unknown, known), known))
        .filter(|(score, _)| *score > 0.7)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Dp, Warmup};

    const GA: &str = r#"
[run]
dir = "runs/x"
[model]
path = "m"
[data]
forget = { path = "f.jsonl", kind = "qa" }
[method]
objective = "ga"
[train]
epochs = 2
[optimizer]
lr = 1e-5
"#;

    fn refusal(text: &str, overrides: &[&str]) -> String {
        let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
        from_str(text, "a.toml", &overrides).unwrap_err().to_string()
    }

    #[test]
    fn defaults_are_filled_in_and_survive_a_round_trip() {
        let config = from_str(GA, "a.toml", &[]).unwrap();
        assert_eq!(config.parallel.dp, Dp::Auto);
        assert_eq!(config.schedule.warmup, Warmup::Fraction(0.0));
        assert_eq!(config.train.global_batch, 32);
        let again = from_str(&to_toml(&config), "b.toml", &[]).unwrap();
        assert_eq!(config, again);
        assert_eq!(digest(&config), digest(&again));
    }

    #[test]
    fn overrides_change_values_and_may_supply_tables() {
        let set = ["parallel.tp=2", "schedule.warmup=1 epoch", "data.template.prompt=Q: {question}"];
        let mut set: Vec<String> = set.iter().map(|s| (*s).to_owned()).collect();
        set.push("data.template.answer={answer}".to_owned());
        let config = from_str(GA, "a.toml", &set).unwrap();
        assert_eq!(config.parallel.tp, 2);
        assert_eq!(config.schedule.warmup, Warmup::Epochs(1.0));
        assert_ne!(digest(&config), digest(&from_str(GA, "a.toml", &[]).unwrap()));
    }

    #[test]
    fn an_unknown_key_is_refused_with_place_and_nearest_key() {
        let text = GA.replace("epochs = 2", "epohcs = 2");
        let message = refusal(&text, &[]);
        assert!(message.starts_with("a.toml:11:1: unknown field `epohcs`"), "{message}");
        assert!(message.ends_with("did you mean `epochs`?"), "{message}");
    }

    #[test]
    fn a_wrong_override_says_how_to_write_it() {
        assert!(refusal(GA, &["lr"]).contains("there is no '='"));
        assert!(refusal(GA, &["run.dir.x=1"]).contains("dir is not a table"));
        assert!(refusal(GA, &["optimizer.lrr=1"]).contains("did you mean `lr`?"));
    }

    #[test]
    fn the_schema_names_every_table() {
        let schema = json_schema();
        for table in ["run", "model", "parallel", "data", "method", "train", "optimizer", "schedule", "eval", "export"]
        {
            assert!(schema.contains(&format!("\"{table}\"")), "{table}");
        }
    }
}
