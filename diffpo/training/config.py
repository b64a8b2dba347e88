"""The configuration of a training run: the algorithm's own settings, and what all algorithms share."""

from typing import TYPE_CHECKING, Annotated, Any, Literal, Union

from diffpo.config import (
    Config,
    Count,
    Device,
    Discriminator,
    Field,
    FolderName,
    Fraction,
    Limit,
    Nats,
    NonNegative,
    Rate,
    RunName,
    Seed,
    Tag,
    create_model,
    fail,
    field_validator,
    flag,
    model_validator,
    nearest,
    parse_flags,
    table,
    toml_and_flags,
)
from diffpo.decoding.rules import PromptThreshold, Rule
from diffpo.decoding_config import RuleConfig
from diffpo.models.model_config import Order, Reads
from diffpo.models.transformer import MaskedDiffusionLM
from diffpo.objectives import OBJECTIVES, AlgorithmConfig
from diffpo.objectives.diffpo import DiffpoConfig
from diffpo.runs.trackers import TrackerName
from diffpo.training.lora_config import LoraConfig

# one of the registered algorithms' settings, told apart by their name
if TYPE_CHECKING:
    Algorithm = AlgorithmConfig
else:
    _TAGGED = tuple(Annotated[kind.Config, Tag(name)] for name, kind in OBJECTIVES.items())
    Algorithm = Annotated[
        Union[_TAGGED],  # noqa: UP007
        Discriminator(
            lambda given: given.get("name", "diffpo") if isinstance(given, dict) else getattr(given, "name", None)
        ),
    ]
BINS = (2.0, 3.0, 4.0, 6.0)
ROLLOUT_ORDER: Order = "confidence"


class RolloutConfig(RuleConfig):
    """How training rollouts are decoded and rewarded. rule auto: the threshold where it is trained, else eb at gamma 0.1."""

    temperature: float = Field(1.0, ge=1e-3, allow_inf_nan=False)
    """at least 0.001: below, the draws of a group are all the same and the gradients, which divide by it, leave fp32"""
    threshold_gammas: tuple[Nats, ...] | None = Field(None, min_length=1)
    """bins (nats) of the threshold that is trained; default 2 3 4 6. The smallest decides how parallel the rollouts are, and so how parallel
    the model learns to decode: a smaller bound is at first always worth more accuracy than it costs speed. Two nats suit answers of a dozen
    tokens; where rollouts at two nats solve nothing, begin lower (benchmarks/notes/experiments.md)"""
    threshold_reads: Reads | None = None
    """what the threshold is read from: the mean hidden state of the masked completion, or the prompt's too (both), pooled by attention instead, or
    both and the completion's entropies; default: both, or what the model's own threshold reads"""
    threshold_exploration: Fraction = 0.0
    """share of the rollouts whose threshold is drawn uniformly over the bins, whatever the model prefers; the importance weights make up for
    it"""
    gen_length: Count | None = None
    """tokens of a completion; default 256, a compact task's own"""
    block_length: Count | None = None
    """tokens decoded before the next ones are begun; default 32, a compact task's own"""
    speed_exponent: NonNegative = 1.0
    """a right answer is worth its task reward * ((L + 1 - NFE) / L) ** speed_exponent, a wrong one at most L ** -speed_exponent; 0 = the task reward alone"""

    @field_validator("threshold_gammas")
    @classmethod
    def _bins_that_differ(cls, gammas: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if gammas is not None and len(set(gammas)) < len(gammas):
            raise ValueError("each bin stands there once")
        return gammas

    def rules(self, model: MaskedDiffusionLM, gen_length: int, trains_threshold: bool) -> tuple[Rule, Rule]:
        """The rule of the rollouts, and the one to evaluate with. Orders by confidence where no other is named."""
        if trains_threshold:
            sampled = PromptThreshold(self.threshold_order, sample=True, explore=self.threshold_exploration)
            return sampled, PromptThreshold(self.threshold_order)
        name = self.chosen(has_threshold=False)  # one that is not trained is used only where it is asked for
        order = self.threshold_order if name == "eb" else self.order
        rule = self.model_copy(update={"rule": name, "order": order}).commit_rule(model, gen_length)
        return rule, rule

    @property
    def bins(self) -> tuple[float, ...]:
        return self.threshold_gammas or BINS

    @property
    def threshold_order(self) -> Order:
        """The order of commitment by an entropy bound, fixed or trained."""
        return self.order or ROLLOUT_ORDER


class UpdateConfig(Config):
    """In which parts a batch is decoded, scored and differentiated."""

    tokens_at_once: Count | None = None
    """tokens of network input, prompts and completions, in one part; smaller takes less memory and gives the same update; default: all
    at once"""
    activation_checkpointing: bool = False
    """keep the input of each block alone and compute the rest again in the backward pass: a fraction of the memory for activations,
    one more forward pass, the same update"""


class DistributedConfig(Config):
    """How several processes share a model (docs/scaling-out.md); torchrun says how many there are."""

    shard: bool = False
    """each process holds a part of the weights, gradients and optimizer, gathered block by block (FSDP2), where a whole copy does not fit"""


class OptimizerConfig(Config):
    """AdamW with linear warm-up, then linear decay to ``final_lr_fraction``."""

    lr: Rate = 2e-4
    threshold_lr: Rate = 2e-3
    weight_decay: NonNegative = 0.0
    warmup_updates: int = Field(10, ge=0, le=2**31 - 1)
    final_lr_fraction: Fraction = 0.1
    max_grad_norm: Limit = 1.0


class GuardConfig(Config):
    """Watches problems of the validation split, so that no kind of problem is ruined while the mean gets better (docs/guard.md)."""

    every: int = Field(50, ge=0, le=2**31 - 1)
    """updates between checks; 0 = only the report at the end"""
    problems: Count = 256
    """of all kinds together; fewer where the validation split holds fewer"""
    tolerance: float = Field(0.2, ge=0, lt=1)
    """share that a kind may lose of what the base model solves at the smallest bin of a threshold that is trained, else by the run's rule"""


class SamplesConfig(Config):
    """A few prompts whose answers and grades are written to samples.jsonl, so that one can read what the model learns (docs/reports.md)."""

    every: int = Field(50, ge=0, le=2**31 - 1)
    """updates between them, beside the beginning and the end; 0 = none at all"""
    count: Count = 4
    """prompts, always the same; at most as many as an update asks"""


class TrainConfig(Config):
    """Reinforcement learning of a masked diffusion LM: python -m diffpo.train [config.toml] [--flags]."""

    model: str = "tiny-countdown"
    """a shipped model, a folder or a hub id"""
    task: str = "countdown"
    """one with training problems, countdown, sudoku or medley; the first two are asked as chat where the model's tokenizer has a chat
    template, else in the words of the tiny models"""
    device: Device = "auto"
    """auto: a GPU where there is one"""
    name: RunName | None = None
    """of the run; its folder is <runs>/<name>; default: the algorithm and the task, as in diffpo-countdown"""
    runs: FolderName = "runs"
    updates: Count = 800
    """batches of rollouts"""
    max_minutes: Limit | None = None
    """stop training early, with everything saved, after this many minutes"""
    seed: Seed = 0
    heldout: Count = 1000
    """held-out problems of the evaluations before and after"""
    split: Literal["test", "validation"] = "test"
    """where they come from: validation while settings are being chosen, so that the test split stays unseen"""
    sweep: bool = True
    """evaluate a sweep of untrained rules too, before and after; without it only one token at a time, the careful bound (see guard) and the
    rule that was trained"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """what the network computes in, and frozen weights are kept in; what is trained is kept in float32. auto: as the checkpoint is stored"""
    compile: bool = False
    """torch.compile the network's layers: 20 s to start on a CPU with a C++ compiler, then a quarter less time for each update of a tiny model"""
    export: Literal["auto", "merged", "adapter"] = "auto"
    """what the run leaves as its model: all weights, adapters merged, or the adapter alone. auto: the adapter where the base has more
    than 2 GB of weights"""
    save_every: Count = 25
    """updates between checkpoints"""
    resume: bool = False
    """continue the run in its folder from the newest checkpoint"""
    overwrite: bool = False
    """delete what an earlier run wrote into the folder first; refused if it holds anything else"""
    allow_config_change: bool = False
    """resume although the configuration differs from the one the run began with"""
    allow_large: bool = False
    """start although the estimate of memory says that the run does not fit"""
    tracker: TrackerName | None = None
    """what draws the metrics while the run goes on; trackio and wandb are packages of their own. Default: tensorboard, where it is installed"""
    dry_run: bool = False
    """print the resolved configuration, and the estimate of memory if the model is on this machine, and stop"""
    algorithm: Algorithm = DiffpoConfig()
    rollout: RolloutConfig = RolloutConfig()
    update: UpdateConfig = UpdateConfig()
    distributed: DistributedConfig = DistributedConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    guard: GuardConfig = GuardConfig()
    samples: SamplesConfig = SamplesConfig()

    @model_validator(mode="before")
    @classmethod
    def _published_rollouts(cls, given: Any) -> Any:
        """The algorithm's own settings of rollouts hold where nothing else is said, from Python as from a command."""
        algorithm, rollout = given.get("algorithm", {}), given.get("rollout", {})
        name = algorithm.get("name", "diffpo") if isinstance(algorithm, dict) else getattr(algorithm, "name", None)
        if isinstance(name, str) and name in OBJECTIVES and isinstance(rollout, dict):
            given = given | {"rollout": OBJECTIVES[name].rollout | rollout}
        return given

    @model_validator(mode="after")
    def _trained_alike(self) -> "TrainConfig":
        learned = "threshold" in self.algorithm.train
        if learned and self.rollout.rule not in ("auto", "learned"):
            raise ValueError(
                f"rollout.rule: a threshold is trained on rollouts that use it, the rule is {self.rollout.rule}: "
                "leave it out, or train the model alone with --algorithm.train model"
            )
        if learned and self.rollout.gamma is not None:
            raise ValueError("rollout.gamma: the threshold is learned: give its bins as rollout.threshold_gammas")
        for name in ("threshold_gammas", "threshold_reads", "threshold_exploration"):
            if not learned and getattr(self.rollout, name):
                raise ValueError(f"rollout.{name}: no threshold is trained: add it to algorithm.train")
        if learned and self.rollout.threshold_exploration:
            self._check_exploration()
        if self.lora.rank is None and self.export == "adapter":
            raise ValueError("export: there is no adapter: give lora.rank, or leave it out")
        if self.lora.rank is not None and "model" not in self.algorithm.train:
            raise ValueError("lora.rank: no model is trained: add it to algorithm.train, or leave the adapters out")
        for part, name in (("model", "lr"), ("threshold", "threshold_lr")):
            if part not in self.algorithm.train and getattr(self.optimizer, name) != getattr(OptimizerConfig(), name):
                raise ValueError(f"optimizer.{name}: no {part} is trained: add it to algorithm.train")
        return self

    def _check_exploration(self) -> None:
        """ValueError where a draw's weight, its probability over that of the mixture, would be left out or cut: its gradient is biased then."""
        assert isinstance(self.algorithm, DiffpoConfig)  # of all algorithms this one has a threshold
        share, cap = self.rollout.threshold_exploration, self.algorithm.weight_cap
        if self.algorithm.importance_weights == "none":
            raise ValueError(
                "rollout.threshold_exploration: what is drawn uniformly must be weighed by its probability: set "
                "algorithm.importance_weights to token"
            )
        largest = 1 / (1 - share + share / len(self.rollout.bins))
        if cap < largest:
            raise ValueError(
                f"rollout.threshold_exploration: at {share:g} a threshold's weight is up to {largest:.3g}, and algorithm.weight_cap "
                f"{cap:g} would cut it: raise the cap, or explore less"
            )

    @property
    def run_name(self) -> str:
        return self.name or f"{self.algorithm.name}-{self.task}"

    @property
    def trains_threshold(self) -> bool:
        return "threshold" in self.algorithm.train


def parse_train(arguments: list[str] | None = None) -> TrainConfig:
    """The configuration of a training: defaults, the algorithm's published ones, a TOML file (the first argument), flags."""
    values, flags = toml_and_flags(arguments)
    name = str(flag(flags, "--algorithm.name") or table(values, "algorithm").get("name", "diffpo"))
    if name not in OBJECTIVES:
        fail(f"algorithm.name: unknown algorithm {name!r}; nearest: {', '.join(nearest(name, OBJECTIVES))}")
    objective = OBJECTIVES[name]
    values["algorithm"] = table(values, "algorithm") | {"name": name}
    values["rollout"] = objective.rollout | table(values, "rollout")
    # the command line of this algorithm alone: a setting that it does not have is unknown there
    others = f"Algorithms: {', '.join(OBJECTIVES)}; --algorithm.name NAME --help shows one's settings."
    kind = create_model("TrainConfig", __base__=TrainConfig, __doc__=f"{TrainConfig.__doc__} {others}",
                        algorithm=(objective.Config, objective.Config(name=name)))  # fmt: skip
    kind.help_flags = "" if name == "diffpo" else f"--algorithm.name {name} "
    parsed = parse_flags(kind, values, flags)
    return TrainConfig.model_validate(parsed.model_dump())
