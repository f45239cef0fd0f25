use shuttle::scheduler::{PctScheduler, RandomScheduler, Scheduler};
use shuttle::{Config, Runner};

/// Runs `model` under so many schedules of each kind.
pub(crate) fn explore(schedules: usize, model: fn()) {
    let times = std::env::var("QCOW2_SHUTTLE").map_or(1, |times| times.parse().unwrap());
    let schedules = schedules * times;
    let seed = times as u64;
    run(RandomScheduler::new_from_seed(seed, schedules), model);
    run(PctScheduler::new_from_seed(seed, 3, schedules), model);
}

fn run(scheduler: impl Scheduler + 'static, model: fn()) {
    let mut config = Config::new();
    config.stack_size = 1 << 18;
    Runner::new(scheduler, config).run(model);
}
