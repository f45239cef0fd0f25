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

/// Runs a small `model` under schedules with more changes of who comes first.
pub(crate) fn explore_deeply(schedules: usize, model: fn()) {
    let times = std::env::var("QCOW2_SHUTTLE").map_or(1, |times| times.parse().unwrap());
    let seed = times as u64;
    run(
        PctScheduler::new_from_seed(seed, 4, schedules * times),
        model,
    );
    run(
        PctScheduler::new_from_seed(seed, 5, schedules * times),
        model,
    );
}
