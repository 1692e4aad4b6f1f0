"""A service: requests of several callers share the engine runs of one pipeline."""

from sg_runtime.service.request import Group, Request, checked
from sg_runtime.service.service import Answer, Service, ServiceSettings
from sg_runtime.service.statistics import PARTS, Parts, Statistics

__all__ = [
    "PARTS",
    "Answer",
    "Group",
    "Parts",
    "Request",
    "Service",
    "ServiceSettings",
    "Statistics",
    "checked",
]
