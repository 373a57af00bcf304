//! The verb `check`.

use std::time::Duration;

use anyhow::bail;

use super::arguments::CheckOptions;
use super::device;
use super::launch::Launched;
use super::run::{Ranks, set_threads, with_ranks};
use crate::bench::{self, Check};

pub(super) fn check(options: &CheckOptions, launched: &Launched) -> anyhow::Result<()> {
    with_ranks(launched, |ranks| check_on(ranks, options, launched))
}

fn check_on(ranks: &Ranks, options: &CheckOptions, launched: &Launched) -> anyhow::Result<()> {
    let timeout = Duration::from_secs(options.timeout);
    let world = ranks.world(options.tp, None, timeout, launched)?;
    set_threads(0, &world)?;
    let device::Chosen { world, device, about } =
        device::choose(options.device, options.allow_shared_gpu, world, timeout)?;
    let check = Check { device, sequence_parallel: options.sequence_parallel, zero: !options.no_zero };
    let lines = tch::no_grad(|| bench::check(&check, &world))?;
    let (table, good) = bench::check_text(&lines);
    if world.is_first() {
        if options.json {
            println!("{}", serde_json::to_string_pretty(&lines)?);
        } else {
            let mesh = world.mesh;
            println!(
                "{about}; ranks: {} (tp {} x dp {})\nlargest relative differences from one rank on a CPU in f32:\n",
                mesh.world(),
                mesh.tp,
                mesh.dp
            );
            print!("{table}");
        }
    }
    world.world.barrier();
    if !good {
        bail!("some numbers differ more than rounding explains; see the table");
    }
    Ok(())
}
