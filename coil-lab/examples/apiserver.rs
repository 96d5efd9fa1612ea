//! The embedded API server alone, for trying `kubectl` against it:
//! `cargo run -p coil-lab --example apiserver -- 127.0.0.1:8001`.

use anyhow::Context as _;
use coil_lab::api::{ApiConfig, ApiServer};

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let address = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "127.0.0.1:8001".to_owned());
    let listener = tokio::net::TcpListener::bind(&address)
        .await
        .with_context(|| format!("listen on {address}"))?;
    let server = ApiServer::new(ApiConfig::default());
    println!("kubectl --server http://{}", listener.local_addr()?);
    server.serve(listener).await.context("serve")
}
