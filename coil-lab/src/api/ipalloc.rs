//! Cluster addresses of services.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde_json::{Value, json};

use super::error::{ApiError, ApiResult, FieldError};
use super::obj;

/// How many addresses of a range are tried.
const SEARCH: usize = 65_536;

/// Allocates service addresses from at most one range per family.
#[derive(Debug)]
pub struct ServiceIps {
    v4: Option<Ipv4Net>,
    v6: Option<Ipv6Net>,
    used: Mutex<BTreeSet<IpAddr>>,
}

impl ServiceIps {
    /// Over the given ranges.
    pub fn new(v4: Option<Ipv4Net>, v6: Option<Ipv6Net>) -> Self {
        Self { v4, v6, used: Mutex::new(BTreeSet::new()) }
    }

    fn used(&self) -> MutexGuard<'_, BTreeSet<IpAddr>> {
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a service its families and addresses. On an update the old ones are kept, and families added or removed
    /// as the policy says.
    pub fn assign(&self, service: &mut Value, old: Option<&Value>, prefer_v6: bool) -> ApiResult<()> {
        if obj::text(service, &["spec", "type"]) == "ExternalName" {
            for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                obj::remove(service, &["spec", field]);
            }
            return Ok(());
        }
        if let Some(old) = old {
            for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                if let Some(value) = obj::at(old, &["spec", field]) {
                    obj::set_default(service, &["spec", field], value.clone());
                }
            }
        }
        let families = self.families(service, prefer_v6)?;
        let policy = obj::text(service, &["spec", "ipFamilyPolicy"]).to_owned();
        obj::set(
            service,
            &["spec", "ipFamilyPolicy"],
            if policy.is_empty() { "SingleStack" } else { &policy },
        );
        obj::set(
            service,
            &["spec", "ipFamilies"],
            families.iter().map(|&name| json!(name)).collect::<Vec<_>>(),
        );
        if obj::text(service, &["spec", "clusterIP"]) == "None" {
            obj::set(service, &["spec", "clusterIPs"], json!(["None"]));
            return Ok(());
        }
        self.assign_addresses(service, old, &families)
    }

    fn assign_addresses(
        &self,
        service: &mut Value,
        old: Option<&Value>,
        families: &[&'static str],
    ) -> ApiResult<()> {
        let wished: Vec<IpAddr> = wished(service);
        let owned: Vec<IpAddr> = old.map(self::wished).unwrap_or_default();
        let mut used = self.used();
        let mut chosen = Vec::new();
        for family in families {
            let is_family = |ip: &&IpAddr| ip.is_ipv4() == (*family == "IPv4");
            let ip = match wished.iter().find(is_family) {
                Some(&ip) if owned.contains(&ip) => ip,
                Some(&ip) => {
                    self.check_wish(service, &used, ip)?;
                    ip
                }
                None => self.next_free(&used, family).ok_or_else(|| {
                    ApiError::internal(format!("failed to allocate a serviceIP: {family} range is full"))
                })?,
            };
            used.insert(ip);
            chosen.push(ip);
        }
        for ip in owned.iter().filter(|ip| !chosen.contains(ip)) {
            used.remove(ip);
        }
        let texts: Vec<Value> = chosen.iter().map(|ip| json!(ip.to_string())).collect();
        obj::set(service, &["spec", "clusterIP"], texts.first().cloned().unwrap_or_default());
        obj::set(service, &["spec", "clusterIPs"], texts);
        Ok(())
    }

    fn check_wish(&self, service: &Value, used: &BTreeSet<IpAddr>, ip: IpAddr) -> ApiResult<()> {
        let ranges = [self.v4.map(IpNet::V4), self.v6.map(IpNet::V6)];
        let detail = if !ranges.iter().flatten().any(|range| range.contains(&ip)) {
            format!("failed to allocate IP {ip}: the provided IP ({ip}) is not in the valid range")
        } else if used.contains(&ip) {
            format!("failed to allocate IP {ip}: provided IP is already allocated")
        } else {
            return Ok(());
        };
        let error = FieldError::invalid("spec.clusterIPs", &json!([ip.to_string()]), detail);
        Err(ApiError::invalid("Service", "", obj::name(service), &[error]))
    }

    fn families(&self, service: &Value, prefer_v6: bool) -> ApiResult<Vec<&'static str>> {
        let has = |family: &str| {
            if family == "IPv4" { self.v4.is_some() } else { self.v6.is_some() }
        };
        let mut wished: Vec<&'static str> = Vec::new();
        let named =
            obj::items(service, &["spec", "ipFamilies"]).iter().filter_map(|one| match one.as_str() {
                Some("IPv4") => Some("IPv4"),
                Some("IPv6") => Some("IPv6"),
                _ => None,
            });
        wished.extend(named);
        for ip in self::wished(service) {
            let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
            if !wished.contains(&family) {
                wished.push(family);
            }
        }
        let order = if prefer_v6 { ["IPv6", "IPv4"] } else { ["IPv4", "IPv6"] };
        let available: Vec<&'static str> = order.into_iter().filter(|family| has(family)).collect();
        let invalid = |detail: String| {
            let value = json!(wished);
            let error = FieldError::invalid("spec.ipFamilies", &value, detail);
            Err(ApiError::invalid("Service", "", obj::name(service), &[error]))
        };
        if let Some(family) = wished.iter().find(|family| !has(family)) {
            return invalid(format!("{family} is not configured on this cluster"));
        }
        let policy = obj::text(service, &["spec", "ipFamilyPolicy"]);
        if policy == "RequireDualStack" && available.len() < 2 {
            return invalid("this cluster is not configured for dual-stack services".to_owned());
        }
        let wanted = match policy {
            "PreferDualStack" | "RequireDualStack" => available.len(),
            _ => 1,
        };
        for family in available {
            if wished.len() < wanted && !wished.contains(&family) {
                wished.push(family);
            }
        }
        wished.truncate(wanted.max(1));
        Ok(wished)
    }

    fn next_free(&self, used: &BTreeSet<IpAddr>, family: &str) -> Option<IpAddr> {
        if family == "IPv4" {
            let first = u32::from(self.v4?.network());
            let size = usize::try_from(u64::from(u32::from(self.v4?.broadcast()) - first)).unwrap_or(SEARCH);
            (1..size.min(SEARCH))
                .filter_map(|offset| u32::try_from(offset).ok())
                .map(|offset| IpAddr::from(std::net::Ipv4Addr::from(first + offset)))
                .find(|ip| !used.contains(ip))
        } else {
            let range = self.v6?;
            let first = u128::from(range.network());
            (1..SEARCH as u128)
                .map(|offset| std::net::Ipv6Addr::from(first + offset))
                .take_while(|ip| range.contains(ip))
                .map(IpAddr::from)
                .find(|ip| !used.contains(ip))
        }
    }

    /// Frees the addresses of a service.
    pub fn release(&self, service: &Value) {
        let mut used = self.used();
        for ip in wished(service) {
            used.remove(&ip);
        }
    }
}

/// The addresses that a service names.
fn wished(service: &Value) -> Vec<IpAddr> {
    let mut all: Vec<IpAddr> = Vec::new();
    let first = obj::at(service, &["spec", "clusterIP"]).into_iter();
    for one in first.chain(obj::items(service, &["spec", "clusterIPs"])) {
        if let Some(ip) = one.as_str().and_then(|text| text.parse().ok()).filter(|ip| !all.contains(ip)) {
            all.push(ip);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn ips() -> ServiceIps {
        ServiceIps::new(Some("10.96.0.0/16".parse().unwrap()), Some("fd00:96::/112".parse().unwrap()))
    }

    #[test]
    fn families_and_addresses() {
        let ips = ips();
        let mut single = json!({"metadata": {"name": "a"}, "spec": {}});
        ips.assign(&mut single, None, false).unwrap();
        assert_eq!(single["spec"]["clusterIPs"], json!(["10.96.0.1"]));
        let mut dual = json!({"spec": {"ipFamilyPolicy": "PreferDualStack"}});
        ips.assign(&mut dual, None, false).unwrap();
        assert_eq!(dual["spec"]["clusterIPs"], json!(["10.96.0.2", "fd00:96::1"]));
        assert_eq!(dual["spec"]["ipFamilies"], json!(["IPv4", "IPv6"]));
        let mut taken = json!({"spec": {"clusterIP": "10.96.0.1"}});
        assert!(ips.assign(&mut taken, None, false).is_err());
        ips.release(&single);
        ips.assign(&mut taken, None, false).unwrap();
        let mut headless = json!({"spec": {"clusterIP": "None"}});
        ips.assign(&mut headless, None, false).unwrap();
        assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
    }

    #[test]
    fn updates_keep_addresses() {
        let ips = ips();
        let mut first = json!({"spec": {"ipFamilies": ["IPv6"]}});
        ips.assign(&mut first, None, false).unwrap();
        let mut update = json!({"spec": {"ipFamilyPolicy": "PreferDualStack"}});
        ips.assign(&mut update, Some(&first), false).unwrap();
        assert_eq!(update["spec"]["clusterIPs"], json!(["fd00:96::1", "10.96.0.1"]));
    }

    #[test]
    fn single_family_cluster() {
        let ips = ServiceIps::new(None, Some("fd00:96::/112".parse().unwrap()));
        let mut service = json!({"spec": {"ipFamilyPolicy": "PreferDualStack"}});
        ips.assign(&mut service, None, false).unwrap();
        assert_eq!(service["spec"]["ipFamilies"], json!(["IPv6"]));
        let mut service = json!({"spec": {"ipFamilyPolicy": "RequireDualStack"}});
        assert!(ips.assign(&mut service, None, false).is_err());
    }
}
