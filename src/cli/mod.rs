//! The command line: verbs, launch facts from the environment, and how a process ends.
//!
//! The only room that reads the environment and prints to standard output.

#![allow(clippy::print_stdout, clippy::print_stderr)]

mod arguments;
mod attack;
mod bench;
mod check;
mod checkpoint;
mod device;
mod doctor;
mod ending;
mod eval;
mod generate;
mod launch;
mod methods;
mod plan;
mod report;
mod run;
mod status;
mod weights;

use std::process::ExitCode;
use std::time::Instant;

use arguments::{Arguments, BenchVerb, ConfigVerb, DataVerb, Verb};
use clap::Parser;

use crate::abi::{host, signals};
use crate::checkpoint::write_random;
use crate::config;
use crate::data::{small_model, synth};
use crate::launch::Code;
use crate::model::families;

/// Exit code for a mistake in command, configuration or data: trying again changes nothing.
pub const EXIT_REFUSED: u8 = Code::Refused.number();

/// Parses the command line and runs it.
pub fn main() -> ExitCode {
    let started = Instant::now();
    host::raise_open_files();
    let launched = launch::Launched::from_lookup(|name| std::env::var(name).ok());
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // one rank's word is enough
            if launched.rank == 0 {
                let _ = error.print();
            }
            return ExitCode::from(if error.use_stderr() { EXIT_REFUSED } else { 0 });
        }
    };
    let run = match &arguments.verb {
        Some(Verb::Run(run)) => run,
        _ => &arguments.run,
    };
    if run.log_format == arguments::LogChoice::Json {
        ending::speak_json();
    }
    if let Some(
        Verb::Config { .. }
        | Verb::Methods(_)
        | Verb::Checkpoint { .. }
        | Verb::Report(_)
        | Verb::Status(_)
        | Verb::Plan(_),
    ) = &arguments.verb
    {
        signals::end_with_the_reader();
    }
    let result = match arguments.verb {
        None => run::run(&arguments.run, &launched, started),
        Some(Verb::Run(run)) => run::run(&run, &launched, started),
        Some(Verb::Launch(options)) => match launch::launch(&options) {
            Ok(code) => return code,
            Err(error) => Err(error),
        },
        Some(Verb::Config { verb: ConfigVerb::Schema }) => {
            println!("{}", config::json_schema());
            Ok(())
        }
        Some(Verb::Config { verb: ConfigVerb::Show { file, set } }) => show(&file, &set),
        Some(Verb::Plan(options)) => plan::plan(&options, &launched),
        Some(Verb::Methods(options)) => methods::methods(&options),
        Some(Verb::Bench { verb: BenchVerb::Step(options) }) => bench::step(&options, &launched),
        Some(Verb::Bench { verb: BenchVerb::Rank(options) }) => bench::rank(&options, &launched),
        Some(Verb::Bench { verb: BenchVerb::Checkpoint(options) }) => bench::checkpoint(&options, &launched),
        Some(Verb::Check(options)) => check::check(&options, &launched),
        Some(Verb::Eval(options)) => eval::eval(&options, &launched, started),
        Some(Verb::Attack(options)) => attack::attack(&options, &launched, started),
        Some(Verb::Generate(options)) => generate::generate(&options, &launched),
        Some(Verb::Doctor(options)) => doctor::doctor(&options, &launched),
        Some(Verb::Status(options)) => status::status(&options),
        Some(Verb::Export(options)) => checkpoint::export(&options, &launched),
        Some(Verb::Checkpoint { verb }) => checkpoint::inspect(&verb),
        Some(Verb::Weights { verb }) => weights::weights(&verb, &launched, started),
        Some(Verb::Report(options)) => report::report(&options),
        Some(Verb::Data { verb: DataVerb::Synth(options) }) => write_synth(&options),
        Some(Verb::Data { verb: DataVerb::Model(options) }) => write_model(&options),
    };
    match result {
        Ok(()) => ending::code(),
        Err(error) => ending::end_early(launched.rank, &error),
    }
}

fn show(file: &std::path::Path, set: &[String]) -> anyhow::Result<()> {
    print!("{}", config::to_toml(&config::any_from_file(file, set)?));
    Ok(())
}

fn write_synth(options: &arguments::SynthOptions) -> anyhow::Result<()> {
    let summary = synth::write(&options.out, &options.into())?;
    let model = options.out.join("model");
    if options.weights {
        write_random(&model, &families::read(&model)?, options.seed)?;
    }
    println!(
        "{}: {} fictional authors, {} questions in all; {} to forget, {} to keep; model/ holds a tokenizer of {} tokens and a config.json{}",
        options.out.display(),
        summary.authors,
        summary.full,
        summary.forget,
        summary.retain,
        summary.vocab_size,
        if options.weights { " with random weights" } else { "" }
    );
    Ok(())
}

fn write_model(options: &arguments::ModelOptions) -> anyhow::Result<()> {
    let arguments::ModelOptions { hidden, layers, heads, kv_heads, intermediate, .. } = *options;
    let shape = small_model::Shape { hidden, layers, heads, kv_heads, intermediate };
    let num_tokens = small_model::from_files(&options.out, &options.text, options.vocab, &shape, options.force)?;
    let parameters = families::read(&options.out)?.num_parameters();
    println!(
        "{}: a Llama of {parameters} parameters without weights, and its tokenizer of {num_tokens} tokens; start it with init = \"random\"",
        options.out.display()
    );
    Ok(())
}
