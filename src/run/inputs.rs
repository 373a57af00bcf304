//! What a run reads: architecture, samples and weights, checked against each other before anything is computed.

use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use super::RunError;
use crate::checkpoint::{CheckpointError, Folder};
use crate::config::{Config, Init, Precision, Retain, Template, TemplateName};
use crate::data::{Dataset, Encoder, Refusals, Wanted, overlap};
use crate::dist::World;
use crate::model::sharding::{ParamId, Piece, Table};
use crate::model::{Architecture, Decoder, LogitsPool, families, init};
use crate::scope;
use crate::telemetry::{Clock, Console};
use crate::train::{Layout, Parameters, Source};
use crate::unlearn;

/// Model and data as they were read; the same on all ranks.
pub struct Inputs {
    pub arch: Architecture,
    /// Samples to forget, or to train on.
    pub anchors: Dataset,
    pub retain: Option<Dataset>,
    /// Samples that are only evaluated.
    watched: Option<Dataset>,
    /// Tasks that are like the one in `anchors`, with their names.
    pub similar: Vec<(String, Dataset)>,
    /// The folder's weights until they are loaded; None for a random start.
    weights: Option<Folder>,
    /// Kind of the weights that were read.
    pub stored_kind: Kind,
    anchors_name: &'static str,
    /// Tokenizer and template.
    pub encoder: Encoder,
    pub warnings: Vec<String>,
}

/// This rank's part of the model.
pub struct Loaded {
    pub decoder: Decoder,
    pub parameters: Parameters,
    /// Digest of the weights that were loaded.
    pub identity: String,
    /// Tensors that may change.
    pub names: Vec<String>,
}

impl Inputs {
    /// Reads configuration and data; refuses what does not fit together. Needs no other rank.
    pub fn read(config: &Config, world: &World) -> Result<Self, RunError> {
        let arch = families::read(&config.model.path)?;
        // the layout is checked before anything slow
        let mut table = Table::new(&arch, world.mesh.tp, world.mesh.tp_rank(), config.parallel.sequence_parallel)?;
        let weights = match config.model.init {
            Init::Random => None,
            Init::Pretrained => Some(Folder::open(&config.model.path)?),
        };
        if let Some(weights) = &weights {
            weights.check(&table)?;
        }
        for (key, layer) in [("layer", config.method.layer), ("attack_layer", config.method.attack_layer)] {
            if let Some(layer) = layer.filter(|&layer| layer >= arch.num_layers) {
                return Err(RunError::Refused(format!(
                    "method.{key} is {layer}, the model's layers are 0 to {}; set method.{key}",
                    arch.num_layers - 1
                )));
            }
        }
        scope::narrow(&mut table, config)?;
        let Sets { anchors, retain, watched, similar, encoder } = sets(config)?;
        let anchors_name = if config.method.objective.learns() { "train" } else { "forget" };
        let stored_kind = weights.as_ref().map_or(Kind::Float, Folder::kind);
        let mut inputs = Self {
            arch,
            anchors,
            retain,
            watched,
            similar,
            weights,
            stored_kind,
            anchors_name,
            encoder,
            warnings: vec![],
        };
        inputs.check(config)?;
        for warning in &inputs.warnings {
            tell(world, warning);
        }
        for (name, set) in inputs.sets() {
            let stats = &set.stats;
            tracing::info!("{name}: {} samples, {} tokens, {} scored", stats.samples, stats.tokens, stats.scored);
        }
        Ok(inputs)
    }

    /// Loads this rank's shards and lets go of the files. All ranks call it.
    pub fn load(
        &mut self,
        config: &Config,
        world: &World,
        device: Device,
        console: &Console,
    ) -> Result<Loaded, RunError> {
        let layout = self.layout(config, world)?;
        self.load_as(layout, config, world, device, console)
    }

    /// As [`Self::load`] with nothing trained.
    pub fn load_still(
        &mut self,
        config: &Config,
        world: &World,
        device: Device,
        console: &Console,
    ) -> Result<Loaded, RunError> {
        let (mut table, names) = (self.table(config, world)?, self.layout(config, world)?.2);
        table.freeze(|_| false);
        let layout = layout_of(&table, config, world);
        self.load_as((table, layout, names), config, world, device, console)
    }

    fn load_as(
        &mut self,
        (table, layout, names): (Table, Layout, Vec<String>),
        config: &Config,
        world: &World,
        device: Device,
        console: &Console,
    ) -> Result<Loaded, RunError> {
        let whole = self.table(config, world)?;
        let kind = computing_kind(config);
        let pieces: usize = table.params.iter().map(|param| param.pieces.len()).sum();
        let mut bar = console.progress("model", pieces as u64, "slices");
        let source = Stored {
            folder: self.weights.as_ref(),
            own: whole.own,
            fresh: |id: usize, piece: &Piece| match id < whole.own {
                true => init::initial(&whole.params[id], piece, config.run.seed, self.arch.initializer_range),
                false => init::adapter(piece, config.run.seed),
            },
            advance: || bar.advance(1, ""),
        };
        let parameters = Parameters::new(&table, layout, kind, device, source)?;
        drop(bar);
        let identity = model_digest(&self.arch, self.weights.as_ref(), config.run.seed, world)?;
        self.weights = None;
        let decoder = Decoder {
            arch: self.arch.clone(),
            table,
            tp: Rc::clone(&world.tp),
            sequence_parallel: config.parallel.sequence_parallel,
            device,
            clock: Clock::default(),
            logits: LogitsPool::default(),
        };
        tracing::info!(
            "model: {} with {:.1} M parameters, digest {}",
            self.arch.family,
            self.arch.num_parameters() as f64 / 1e6,
            &identity[..16]
        );
        Ok(Loaded { decoder, parameters, identity, names })
    }

    /// Size of the whole model's weights, f32 where they are drawn.
    pub fn model_bytes(&self) -> u64 {
        self.arch.num_parameters() as u64 * self.stored_kind.elt_size_in_bytes() as u64
    }

    /// The shards of this rank with everything trained.
    pub fn table(&self, config: &Config, world: &World) -> Result<Table, RunError> {
        let mesh = world.mesh;
        Ok(Table::new(&self.arch, mesh.tp, mesh.tp_rank(), config.parallel.sequence_parallel)?)
    }

    /// The shards of every tensor-parallel rank with everything trained.
    pub fn tables(&self, config: &Config, world: &World) -> Result<Vec<Table>, RunError> {
        let (tp, spread) = (world.mesh.tp, config.parallel.sequence_parallel);
        let tables: Result<Vec<Table>, _> = (0..tp).map(|rank| Table::new(&self.arch, tp, rank, spread)).collect();
        Ok(tables?)
    }

    /// Where this rank's part of every parameter lies, and the names of the tensors that may change.
    pub fn layout(&self, config: &Config, world: &World) -> Result<(Table, Layout, Vec<String>), RunError> {
        let mut table = self.table(config, world)?;
        let names = scope::narrow(&mut table, config)?;
        let layout = layout_of(&table, config, world);
        Ok((table, layout, names))
    }

    /// This rank's values of a parameter as they were read, f32; `table` says which pieces.
    pub fn original(
        &self,
        config: &Config,
        table: &Table,
        id: usize,
        folder: Option<&Folder>,
    ) -> Result<Tensor, RunError> {
        let param = &table.params[id];
        let values = Tensor::empty(&param.shape, (Kind::Float, Device::Cpu));
        for piece in &param.pieces {
            let part = match folder {
                Some(folder) => folder.slice(piece)?,
                None => init::initial(param, piece, config.run.seed, self.arch.initializer_range),
            };
            values.narrow(0, piece.row, piece.size[0]).copy_(&part);
        }
        Ok(values)
    }

    /// What a score looks at.
    pub fn scored<'a>(&'a self, config: &Config) -> scope::Sets<'a> {
        let (seed, budget) = (config.run.seed, config.train.micro_batch_tokens);
        let look = |name, set: &'a Dataset| scope::Look { name, set, samples: set.samples.len(), seed, budget };
        scope::Sets {
            forget: look("the forget set", &self.anchors),
            retain: self.retain.as_ref().map(|set| look("the retain set", set)),
        }
    }

    /// What decides what a run computes besides its configuration: digests of the model (`identity`) and of the data, by name.
    pub fn digests(&self, identity: &str) -> Vec<(String, String)> {
        let model = ("model".to_owned(), identity.to_owned());
        [vec![model], self.data_digests()].concat()
    }

    /// Those of the data sets alone.
    pub fn data_digests(&self) -> Vec<(String, String)> {
        let retain = self.retain.as_ref().map(|set| ("data.retain".to_owned(), set.digest.clone()));
        let anchors = (format!("data.{}", self.anchors_name), self.anchors.digest.clone());
        [Some(anchors), retain].into_iter().flatten().collect()
    }

    /// All sets that are evaluated, by name.
    pub fn sets(&self) -> Vec<(&str, &Dataset)> {
        let named = [
            (self.anchors_name, Some(&self.anchors)),
            ("forget", self.watched.as_ref()),
            ("retain", self.retain.as_ref()),
        ];
        let similar = self.similar.iter().map(|(name, set)| (name.as_str(), Some(set)));
        named.into_iter().chain(similar).filter_map(|(name, set)| Some((name, set?))).collect()
    }

    fn check(&mut self, config: &Config) -> Result<(), RunError> {
        for (_, set) in self.sets() {
            for (sample, &line) in set.samples.iter().chain(&set.preferred).zip(set.lines.iter().cycle()) {
                if let Some(id) = sample.tokens.iter().find(|&&id| i64::from(id) >= self.arch.vocab) {
                    return Err(RunError::Refused(format!(
                        "{}:{line}: the tokenizer gives token {id}, the model's vocabulary has {} rows; tokenizer and model in {} do not belong together",
                        set.path.display(),
                        self.arch.vocab,
                        config.model.path.display()
                    )));
                }
            }
        }
        let warnings: Vec<String> = self.sets().iter().flat_map(|(_, set)| set.warnings()).collect();
        self.warnings.extend(warnings);
        let longest = self.sets().iter().map(|(_, set)| set.stats.longest as i64).max().unwrap_or(0);
        let positions = self.arch.max_positions;
        if longest > positions {
            let text = format!("the longest sample has {longest} tokens, the model was made for {positions}");
            if self.arch.positions_are_hard() {
                let advice = format!("{text} with these rotary factors; set data.max_length = {positions}");
                return Err(RunError::Refused(advice));
            }
            self.warnings.push(text);
        }
        if let Some(retain) = self.retain.as_ref().filter(|_| config.method.retain != Retain::None) {
            let both = overlap(&self.anchors, retain);
            if both.len() == self.anchors.samples.len() {
                return Err(RunError::Refused(format!(
                    "every sample of {} is in {} too: nothing would be forgotten; are the two paths the wrong way round?",
                    self.anchors.path.display(),
                    retain.path.display()
                )));
            }
            if let Some((forget, kept)) = both.first() {
                self.warnings.push(format!(
                    "{} of {} forget samples are retain samples too (first: {}:{} and {}:{}); they are pulled both ways",
                    both.len(),
                    self.anchors.samples.len(),
                    self.anchors.path.display(),
                    self.anchors.lines[*forget],
                    retain.path.display(),
                    retain.lines[*kept]
                ));
            }
        }
        Ok(())
    }
}

/// The samples of a run.
pub struct Sets {
    /// To forget or to train on.
    pub anchors: Dataset,
    pub retain: Option<Dataset>,
    /// Only evaluated.
    pub watched: Option<Dataset>,
    /// Like the anchors, by name.
    pub similar: Vec<(String, Dataset)>,
    /// Tokenizer and template of all of them.
    pub encoder: Encoder,
}

/// Reads the samples of a run; needs no weights.
pub fn sets(config: &Config) -> Result<Sets, RunError> {
    let data = &config.data;
    // texts need no template
    let template = data.template.as_ref().unwrap_or(&Template::Named(TemplateName::Chat));
    let encoder = Encoder::from_folder(&config.model.path, template, data.system.as_deref())?;
    let seed = config.run.seed;
    let refusals = data.refusals.as_ref().map_or_else(|| Ok(Refusals::own(seed)), |path| Refusals::read(path, seed))?;
    let (wanted, retain_wanted) = unlearn::wanted(&config.method);
    let load =
        |name: &str, source, wanted| Dataset::load_pairs(name, source, &encoder, data.max_length, wanted, &refusals);
    let learns = config.method.objective.learns();
    let (key, source) = if learns { ("data.train", &data.train) } else { ("data.forget", &data.forget) };
    let source = source.as_ref().expect("invariant: the configuration was validated");
    let anchors = load(key, source, wanted)?;
    let retain = data.retain.as_ref().map(|source| load("data.retain", source, retain_wanted)).transpose()?;
    let watched = data.forget.as_ref().filter(|_| learns);
    let watched = watched.map(|source| load("data.forget", source, Wanted::Nothing)).transpose()?;
    let similar = config.subspace.iter().flat_map(|subspace| &subspace.similar).enumerate();
    let similar = similar.map(|(index, source)| {
        let set = load(&format!("subspace.similar[{index}]"), source, Wanted::Nothing)?;
        Ok::<_, RunError>((format!("similar_{}", index + 1), set))
    });
    let similar = similar.collect::<Result<_, _>>()?;
    Ok(Sets { anchors, retain, watched, similar, encoder })
}

/// How this rank's share of what is trained is cut.
pub fn layout_of(table: &Table, config: &Config, world: &World) -> Layout {
    Layout::of(table, &config.parallel, world.mesh)
}

/// The kind of tensor that the model computes in.
pub fn computing_kind(config: &Config) -> Kind {
    match config.train.precision {
        Precision::Bf16 => Kind::BFloat16,
        Precision::F32 => Kind::Float,
    }
}

fn tell(world: &World, warning: &str) {
    if world.is_first() {
        tracing::warn!("{warning}");
    }
}

/// Digest of the weight files and the architecture, or of what random weights are made from. All ranks call it.
pub fn model_digest(
    arch: &Architecture,
    weights: Option<&Folder>,
    seed: u64,
    world: &World,
) -> Result<String, CheckpointError> {
    let mut lines = match weights {
        None => vec![format!("random {seed} {arch:?}")],
        Some(folder) => {
            let mine = folder.digests(world.mesh.rank, world.mesh.world())?.join("\n");
            let all = world.world.gather_bytes(mine.as_bytes());
            let all = all.iter().map(|text| String::from_utf8_lossy(text).into_owned());
            let files = all.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>());
            // the same weights are another model under another config.json
            files.chain([format!("{arch:?}")]).collect()
        }
    };
    lines.sort();
    Ok(blake3::hash(lines.join("\n").as_bytes()).to_hex().to_string())
}

/// Values from a folder, where there is one and it knows the parameter, else fresh ones.
struct Stored<'a, F, A> {
    folder: Option<&'a Folder>,
    /// Number of the model's own parameters; adapters follow.
    own: usize,
    fresh: F,
    advance: A,
}

impl<F: Fn(ParamId, &Piece) -> Tensor, A: FnMut()> Source for Stored<'_, F, A> {
    type Error = CheckpointError;

    fn read(&mut self, id: ParamId, piece: &Piece) -> Result<Tensor, CheckpointError> {
        (self.advance)();
        match self.folder.filter(|_| id < self.own) {
            Some(folder) => folder.slice(piece),
            None => Ok((self.fresh)(id, piece)),
        }
    }

    fn place(&self, id: ParamId, piece: &Piece) -> (usize, usize) {
        self.folder.filter(|_| id < self.own).map_or((0, 0), |folder| folder.place(&piece.name))
    }
}
