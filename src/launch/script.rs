//! A batch script for Slurm: the template of `cluster/slurm` with a launch's numbers and arguments filled in.

use super::engine::quote;

/// What a batch job asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    pub name: String,
    pub nodes: usize,
    pub ranks_per_node: usize,
    /// As `sbatch --time`.
    pub time: Option<String>,
    /// Where the output of the batch script goes.
    pub output: String,
    /// Further options of sbatch, such as `--partition=gpu`.
    pub options: Vec<String>,
    /// The program, then the arguments of `launch`.
    pub command: Vec<String>,
}

const TEMPLATE: &str = include_str!("../../cluster/slurm/run.sbatch");
/// The line of the template before which arguments are set.
const MARK: &str = "# arguments:";

/// The script.
pub fn script(batch: &Batch) -> String {
    let mut own = vec![
        ("--job-name", batch.name.clone()),
        ("--nodes", batch.nodes.to_string()),
        ("--ntasks-per-node", batch.ranks_per_node.to_string()),
        ("--output", batch.output.clone()),
    ];
    own.extend(batch.time.clone().map(|time| ("--time", time)));
    let mut lines = Vec::new();
    let mut last_directive = 0;
    for line in TEMPLATE.lines() {
        let replaced = own.iter().find(|(name, _)| line.starts_with(&format!("#SBATCH {name}=")));
        match replaced {
            Some((name, value)) => lines.push(format!("#SBATCH {name}={value}")),
            None => lines.push(line.to_owned()),
        }
        if line.starts_with("#SBATCH") {
            last_directive = lines.len();
        }
        if line.starts_with(MARK) {
            let (program, rest) = batch.command.split_first().expect("invariant: a command has a program");
            let words: Vec<String> = rest.iter().map(|word| quote(word)).collect();
            lines.push(format!("DUNLEARN={}", quote(program)));
            lines.push(format!("set -- {}", words.join(" ")));
        }
    }
    let options = batch.options.iter().map(|option| format!("#SBATCH {option}")).collect::<Vec<_>>();
    lines.splice(last_directive..last_directive, options);
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_has_every_line_that_is_filled_in() {
        let batch = Batch {
            name: "npo".to_owned(),
            nodes: 2,
            ranks_per_node: 8,
            time: Some("12:00:00".to_owned()),
            output: "runs/x/slurm-%j.out".to_owned(),
            options: vec!["--partition=gpu".to_owned()],
            command: ["/opt/dunlearn", "--np", "16", "--", "--config", "my run.toml"].map(str::to_owned).to_vec(),
        };
        let text = script(&batch);
        for line in [
            "#SBATCH --job-name=npo",
            "#SBATCH --nodes=2",
            "#SBATCH --ntasks-per-node=8",
            "#SBATCH --time=12:00:00",
            "#SBATCH --output=runs/x/slurm-%j.out",
            "#SBATCH --partition=gpu",
            "DUNLEARN=/opt/dunlearn",
            "set -- --np 16 -- --config 'my run.toml'",
        ] {
            assert_eq!(text.lines().filter(|found| *found == line).count(), 1, "{line}\n{text}");
        }
        assert!(!text.contains("--nodes=1"), "{text}");
    }
}
