//! The verb `generate`: asks a model.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args;
use serde_json::{Map, Value, json};
use tch::Kind;

use super::arguments::{ProgressChoice, word};
use super::device;
use super::launch::Launched;
use super::run::{Ranks, progress_mode, set_threads, with_ranks};
use crate::checkpoint::Folder;
use crate::config::{self, Precision, Template, TemplateName};
use crate::data::{Encoder, Message, Role};
use crate::eval::generate::{Ended, GenerateOptions, Generation, Sampling, generate as continue_all};
use crate::model::sharding::Table;
use crate::model::{Architecture, Decoder, LogitsPool, families};
use crate::telemetry::{Clock, Console, LogFormat};

/// Longest wait for ranks that read files or have more to write.
const TIMEOUT: Duration = Duration::from_secs(4 * 3600);

#[derive(Debug, Args)]
#[group(skip)]
pub(super) struct GenerateArguments {
    /// Hugging Face folder, or the folder of a run that exported its model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// What the model is asked; may be given several times
    #[arg(long, short, value_name = "TEXT", required_unless_present = "prompts")]
    prompt: Vec<String>,
    /// JSONL with a "prompt", a "question" or chat "messages" a line; other fields are kept in the output
    #[arg(long, value_name = "FILE")]
    prompts: Option<PathBuf>,
    /// Write JSONL here: the line's fields, and "generation", "ended", "tokens"
    #[arg(long, short, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Print JSONL instead of text
    #[arg(long)]
    json: bool,
    #[arg(long, default_value_t = 128)]
    max_new_tokens: usize,
    /// 0: always the likeliest token; above: draw from softmax(logits / temperature)
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Draw among the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 1.0)]
    top_p: f64,
    /// Draw among the k likeliest tokens; 0: all
    #[arg(long, default_value_t = 0)]
    top_k: usize,
    /// Of the draws: same seed, same text, on any number of ranks
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// End a continuation before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Ask with the chat template of the folder; the default where it has one
    #[arg(long, conflicts_with_all = ["raw", "template"])]
    chat: bool,
    /// Continue the text of the prompt as it is
    #[arg(long, conflicts_with = "template")]
    raw: bool,
    /// Ask with this text, e.g. "Question: {question}\nAnswer:"; \n is a line break
    #[arg(long, value_name = "TEXT")]
    template: Option<String>,
    /// Message that stands before the question in the chat template
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["raw", "template"])]
    system: Option<String>,
    /// f32 or bf16; by default f32 where the folder has f32, else bf16
    #[arg(long, value_parser = word::<Precision>)]
    precision: Option<Precision>,
    /// Ranks that share one copy of the model; the copies share the prompts
    #[arg(long, default_value_t = 1)]
    tp: usize,
    /// As run.device: auto, cpu or cuda
    #[arg(long, default_value = "auto", value_parser = word::<config::Device>)]
    device: config::Device,
    /// Let several ranks share a GPU
    #[arg(long)]
    allow_shared_gpu: bool,
    /// Threads of one rank; 0 means cores / ranks on the host
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Sequences that a rank writes at a time
    #[arg(long, default_value_t = GenerateOptions::default().rows)]
    rows: usize,
    /// Memory for keys and values on a rank, in MiB; fewer rows where they do not fit
    #[arg(long, default_value_t = GenerateOptions::default().cache_bytes >> 20)]
    cache_mib: usize,
    /// Read the whole text again for every token: slow, for checks
    #[arg(long)]
    no_cache: bool,
    /// Progress bars, plain lines, or nothing
    #[arg(long, value_enum, default_value_t = ProgressChoice::Auto)]
    progress: ProgressChoice,
}

pub(super) fn generate(options: &GenerateArguments, launched: &Launched) -> anyhow::Result<()> {
    with_ranks(launched, |ranks| generate_on(ranks, options, launched))
}

fn generate_on(ranks: &Ranks, options: &GenerateArguments, launched: &Launched) -> anyhow::Result<()> {
    let sampling = options.sampling()?;
    let folder = model_folder(&options.model);
    let arch = families::read(&folder)?;
    let questions = options.questions()?;
    let encoder = options.encoder(&folder)?;
    let raw = options.raw || (options.template.is_none() && !encoder.has_chat_template());
    let asked = |question: &Question| question.tokens(&encoder, raw);
    let prompts = questions.iter().map(asked).collect::<anyhow::Result<Vec<_>>>()?;

    let world = ranks.world(options.tp, None, TIMEOUT, launched)?;
    set_threads(options.threads, &world)?;
    let device::Chosen { world, device, about } =
        device::choose(options.device, options.allow_shared_gpu, world, TIMEOUT)?;
    let console = Console::new(progress_mode(options.progress, launched.rank, LogFormat::Text));
    let table = Table::new(&arch, world.mesh.tp, world.mesh.tp_rank(), false)?;
    let files = Folder::open(&folder)?;
    files.check(&table)?;
    let kind = match options.precision {
        Some(Precision::F32) => Kind::Float,
        Some(Precision::Bf16) => Kind::BFloat16,
        None if files.kind() == Kind::Float => Kind::Float,
        None => Kind::BFloat16,
    };
    let pieces: usize = table.params.iter().map(|param| param.pieces.len()).sum();
    let mut bar = console.progress("model", pieces as u64, "slices");
    let weights = tch::no_grad(|| files.weights(&table, kind, device, || bar.advance(1, "")))?;
    drop((bar, files));
    let decoder = Decoder {
        arch,
        table,
        tp: Rc::clone(&world.tp),
        sequence_parallel: false,
        device,
        clock: Clock::default(),
        logits: LogitsPool::default(),
    };
    let how = GenerateOptions {
        max_new_tokens: options.max_new_tokens,
        sampling,
        stop: options.stop.clone(),
        stop_at_eos: true,
        rows: options.rows.max(1),
        cache_bytes: options.cache_mib << 20,
        cached: !options.no_cache,
    };
    if world.is_first() {
        let (mesh, millions) = (world.mesh, decoder.arch.num_parameters() as f64 / 1e6);
        let kind = if kind == Kind::Float { "f32" } else { "bf16" };
        let ranks = format!("ranks: {} (tp {} x dp {})", mesh.world(), mesh.tp, mesh.dp);
        // why it is no GPU interests only those who have one
        let about = about.split(':').next().filter(|_| device == tch::Device::Cpu).unwrap_or(&about);
        eprintln!(
            "{}: {} with {millions:.1} M parameters in {kind}; {about}; {ranks}",
            folder.display(),
            decoder.arch.family
        );
        warn_of_length(&decoder.arch, &prompts, options.max_new_tokens);
    }
    let mut bar = console.progress("writing", prompts.len().div_ceil(world.mesh.dp) as u64, "prompts");
    let start = Instant::now();
    let generations = tch::no_grad(|| {
        continue_all(&decoder, &weights, &encoder, &prompts, &how, &world, |n| bar.advance(n as u64, ""))
    })?;
    let seconds = start.elapsed().as_secs_f64();
    drop(bar);
    if world.is_first() {
        tell(options, &questions, &generations)?;
        let tokens: usize = generations.iter().map(|one| one.tokens.len() + usize::from(one.ended == Ended::Eos)).sum();
        let read: usize = prompts.iter().map(Vec::len).sum();
        eprintln!(
            "{} prompts of {read} tokens, {tokens} tokens written in {seconds:.1} s: {:.0} tokens/s",
            prompts.len(),
            tokens as f64 / seconds
        );
    }
    world.world.barrier();
    Ok(())
}

/// The folder itself, or the exported model of a run's folder.
fn model_folder(path: &Path) -> PathBuf {
    let exported = path.join("model");
    if !path.join("config.json").is_file() && exported.join("config.json").is_file() {
        exported
    } else {
        path.to_owned()
    }
}

impl GenerateArguments {
    fn sampling(&self) -> anyhow::Result<Sampling> {
        let Self { temperature, top_k, top_p, seed, .. } = *self;
        if !(temperature >= 0.0 && temperature.is_finite()) {
            bail!("--temperature is {temperature}; expected 0 (greedy) or a number above");
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            bail!("--top-p is {top_p}; expected a probability above 0 and up to 1");
        }
        if temperature == 0.0 && (top_k > 0 || top_p < 1.0) {
            bail!("--top-k and --top-p have no effect at temperature 0; add e.g. --temperature 1");
        }
        Ok(if temperature == 0.0 { Sampling::Greedy } else { Sampling::Random { temperature, top_k, top_p, seed } })
    }

    fn encoder(&self, folder: &Path) -> anyhow::Result<Encoder> {
        let template = match &self.template {
            Some(text) if !text.contains("{question}") => {
                bail!("--template is {text:?}; expected a text with {{question}} in it")
            }
            Some(text) => Template::Explicit(config::ExplicitTemplate {
                prompt: text.replace("\\n", "\n"),
                answer: "{answer}".to_owned(),
            }),
            None => Template::Named(TemplateName::Chat),
        };
        let encoder = Encoder::from_folder(folder, &template, self.system.as_deref())?;
        if (self.chat || self.system.is_some()) && !encoder.has_chat_template() {
            bail!("{} has no chat template; ask with --raw or --template", folder.display());
        }
        Ok(encoder)
    }

    fn questions(&self) -> anyhow::Result<Vec<Question>> {
        let typed = self.prompt.iter().map(|text| Question { asked: Asked::Text(text.clone()), fields: Map::new() });
        let mut questions: Vec<Question> = typed.collect();
        if let Some(path) = &self.prompts {
            let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
                let question = Question::parse(line).with_context(|| format!("{}:{number}", path.display()))?;
                questions.push(question);
            }
            if questions.is_empty() {
                bail!("{} has no line with a prompt", path.display());
            }
        }
        Ok(questions)
    }
}

/// One thing that the model is asked.
struct Question {
    asked: Asked,
    /// The line that it came from.
    fields: Map<String, Value>,
}

enum Asked {
    Text(String),
    Turns(Vec<Message>),
}

impl Question {
    fn parse(line: &str) -> anyhow::Result<Self> {
        let fields: Map<String, Value> = serde_json::from_str(line).context("is not a JSON object")?;
        let text = ["prompt", "question"].iter().find_map(|&key| fields.get(key).and_then(Value::as_str));
        let asked = match (text, fields.get("messages")) {
            (Some(text), None) => Asked::Text(text.to_owned()),
            (None, Some(Value::Array(turns))) => Asked::Turns(turns.iter().map(turn).collect::<anyhow::Result<_>>()?),
            _ => {
                let found: Vec<&str> = fields.keys().map(String::as_str).collect();
                bail!(
                    "found the fields {}; expected one of \"prompt\" or \"question\" with a text, or \"messages\" with a list",
                    found.join(", ")
                );
            }
        };
        Ok(Self { asked, fields })
    }

    fn tokens(&self, encoder: &Encoder, raw: bool) -> anyhow::Result<Vec<i32>> {
        Ok(match &self.asked {
            Asked::Text(text) if raw => encoder.text(text)?,
            Asked::Text(text) => encoder.question(text)?,
            Asked::Turns(_) if raw => bail!("\"messages\" need the chat template; leave out --raw"),
            Asked::Turns(turns) => encoder.turns(turns)?,
        })
    }

    fn text(&self) -> &str {
        match &self.asked {
            Asked::Text(text) => text,
            Asked::Turns(turns) => turns.last().map_or("", |turn| &turn.content),
        }
    }
}

fn turn(value: &Value) -> anyhow::Result<Message> {
    let field = |key: &str| value.get(key).and_then(Value::as_str);
    let (Some(role), Some(content)) = (field("role"), field("content")) else {
        bail!("a message is {value}; expected {{\"role\": ..., \"content\": ...}} with texts");
    };
    let role = [Role::System, Role::User, Role::Assistant, Role::Tool].into_iter().find(|known| known.name() == role);
    let role =
        role.with_context(|| format!("the role of a message in {value}; expected system, user, assistant or tool"))?;
    Ok(Message { role, content: content.to_owned() })
}

fn warn_of_length(arch: &Architecture, prompts: &[Vec<i32>], new: usize) {
    let longest = prompts.iter().map(Vec::len).max().unwrap_or(0);
    if (longest + new) as i64 > arch.max_positions {
        eprintln!(
            "warning: the longest prompt has {longest} tokens; with {new} new ones that is more than the {} the model was made for",
            arch.max_positions
        );
    }
}

/// Writes the continuations to where they are wanted.
fn tell(options: &GenerateArguments, questions: &[Question], generations: &[Generation]) -> anyhow::Result<()> {
    if options.json || options.out.is_some() {
        let mut lines = String::new();
        for (question, generation) in questions.iter().zip(generations) {
            _ = writeln!(lines, "{}", line(question, generation));
        }
        match &options.out {
            Some(path) => {
                std::fs::write(path, lines).with_context(|| format!("cannot write {}", path.display()))?;
                eprintln!("{}: {} continuations", path.display(), generations.len());
            }
            None => print!("{lines}"),
        }
        return Ok(());
    }
    let mut out = std::io::stdout().lock();
    let (bold, dim, plain) = if out.is_terminal() { ("\x1b[1m", "\x1b[2m", "\x1b[0m") } else { ("", "", "") };
    for (question, generation) in questions.iter().zip(generations) {
        let end = match generation.ended {
            Ended::Length => format!(" {dim}[{} tokens, not ended]{plain}", generation.tokens.len()),
            Ended::Eos | Ended::Stop => String::new(),
        };
        let text = if options.raw { generation.text.as_str() } else { generation.text.trim() };
        writeln!(out, "\n{bold}{}{plain}\n{text}{end}", question.text().trim_end())?;
    }
    writeln!(out)?;
    Ok(())
}

fn line(question: &Question, generation: &Generation) -> Value {
    let mut fields = question.fields.clone();
    if fields.is_empty() {
        fields.insert("prompt".to_owned(), json!(question.text()));
    }
    let ended = match generation.ended {
        Ended::Eos => "eos",
        Ended::Stop => "stop",
        Ended::Length => "length",
    };
    fields.insert("generation".to_owned(), json!(generation.text));
    fields.insert("ended".to_owned(), json!(ended));
    fields.insert("tokens".to_owned(), json!(generation.tokens));
    Value::Object(fields)
}
