//! What every Coil daemon shares, and nothing about networking: command lines ([`cli`]), logging
//! ([`telemetry`]), tasks and shutdown ([`tasks`]), readiness ([`readiness`]), health and metrics servers
//! ([`admin`]), the metric registry ([`metrics`]), the Kubernetes client ([`kube_client`]), leader
//! election ([`lease`]), durations of flags ([`duration`]) and the clock ([`clock`]).
//!
//! A daemon is put together like this:
//!
//! ```no_run
//! use std::{ffi::OsString, process::ExitCode, time::Duration};
//! use coil_runtime::{admin, cli, kube_client, metrics, readiness::Readiness, tasks::Tasks, telemetry};
//!
//! /// Does things.
//! #[derive(clap::Parser)]
//! struct Args {
//!     /// Address of the metrics server.
//!     #[arg(long, env = "COIL_METRICS_ADDR", default_value = ":9384")]
//!     metrics_addr: admin::ListenAddr,
//!     /// Address of the health server.
//!     #[arg(long, env = "COIL_HEALTH_ADDR", default_value = ":9385")]
//!     health_addr: admin::ListenAddr,
//!     /// A switch that can be turned off: `--enable=false`.
//!     #[arg(long, env = "COIL_ENABLE", default_value_t = true, action = clap::ArgAction::Set,
//!           num_args = 0..=1, require_equals = true, default_missing_value = "true")]
//!     enable: bool,
//!     #[command(flatten)]
//!     log: telemetry::LogArgs,
//! }
//!
//! const NAME: &str = "thingd";
//!
//! pub fn main_with(args: Vec<OsString>) -> ExitCode {
//!     cli::run(NAME, args, |args: Args| async move {
//!         let log = telemetry::init(NAME, &args.log)?;
//!         let registry = metrics::registry(NAME)?;
//!         let health = admin::bind("--health-addr", &args.health_addr).await?;
//!         let metrics = admin::bind("--metrics-addr", &args.metrics_addr).await?;
//!         let readiness = Readiness::new();
//!         let synced = readiness.blocker("first-list");
//!         let client = kube_client::client(NAME).await?;
//!
//!         let mut tasks = Tasks::new()?;
//!         tasks.spawn("health server", |drain| admin::serve_health(health, readiness.clone(), log, drain));
//!         tasks.spawn("metrics server", |drain| admin::serve_metrics(metrics, registry.clone(), drain));
//!         tasks.spawn("worker", move |drain| async move {
//!             client.apiserver_version().await?;
//!             drop(synced); // now ready
//!             drain.cancelled().await; // SIGTERM, SIGINT, or another task failed
//!             anyhow::Ok(())
//!         });
//!         tasks.run(Duration::from_secs(20)).await?;
//!         Ok(())
//!     })
//! }
//! ```

pub mod admin;
pub mod cli;
pub mod clock;
pub mod duration;
pub mod kube_client;
pub mod lease;
pub mod metrics;
pub mod patience;
pub mod readiness;
pub mod tasks;
pub mod telemetry;
